"""How a layer's heads are divided over ranks that attend to the same tokens. Knows no torch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

Run = tuple[int, int]  # [first, end)


class Slice(NamedTuple):
    """One rank's query heads and key heads, each as [first, end).

    Query head h of the slice reads its key head h // (query heads / key heads), counted inside
    the slice: grouped-query attention works on a slice as on the whole.
    """

    heads: Run
    kv_heads: Run


class Waves(NamedTuple):
    """Waves [begin, end) out of `every`. A wave is one of `every` equal parts of a layer's heads.

    Attention works wave by wave, so that one wave's tokens travel while another wave is projected
    or attended to.
    """

    begin: int
    end: int
    every: int

    def share(self, heads: int) -> Run:
        """These waves' part of `heads` heads, as [first, end)."""
        return heads * self.begin // self.every, heads * self.end // self.every


@cache
def split(heads: int, kv_heads: int, slices: int, wave: int = 0) -> tuple[Slice, ...]:
    """Divide one wave's heads into `slices` slices, as evenly as grouped heads allow.

    With slices ≤ key heads, each slice takes whole groups: a key head and all its query heads.
    With more, several slices divide the query heads of one key head, and each has a copy of it.
    The list is rotated left by `wave`, so that uneven slices do not give one rank the largest slice
    in every wave.

    Args:
        heads, kv_heads: of one wave.

    Raises:
        ValueError: more slices than query heads.
    """
    if slices > heads:
        raise ValueError(f"{heads} heads cannot be split into {slices} slices")
    ratio = heads // kv_heads
    found = []
    for (first, end), sharers in divide(kv_heads, slices):
        if len(sharers) == 1:
            found.append(Slice((first * ratio, end * ratio), (first, end)))
            continue
        for (a, b), holders in divide(ratio, len(sharers)):
            assert len(holders) == 1
            found.append(Slice((first * ratio + a, first * ratio + b), (first, end)))
    shift = wave % slices
    return (*found[shift:], *found[:shift])


@cache
def fractions(
    heads: int, kv_heads: int, slices: int, waves: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Each slice's share of all query heads, and of all key heads: float64 (slices,) each.

    Shares of key heads sum to more than 1 where slices have copies.
    """
    every = [split(heads // waves, kv_heads // waves, slices, wave) for wave in range(waves)]
    runs = np.array(every, dtype=np.float64)  # (waves, slices, 2: queries or keys, 2: first, end)
    queries, keys = np.moveaxis(runs[..., 1] - runs[..., 0], 2, 0).sum(axis=1)  # (slices,) each
    return queries / heads, keys / kv_heads


def divide(items: int, ranks: int) -> list[tuple[Run, range]]:
    """Divide items over ranks: (run of items, run of ranks that shares it) pairs, in order.

    With items ≥ ranks every run of items has one rank; with fewer, every item has its own run of
    ranks. Sizes differ by one at most.
    """
    runs = min(items, ranks)
    return [
        (
            (items * i // runs, items * (i + 1) // runs),
            range(ranks * i // runs, ranks * (i + 1) // runs),
        )
        for i in range(runs)
    ]
