"""How heads are split over ranks that attend to the same tokens. Knows no torch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

Run = tuple[int, int]


class Slice(NamedTuple):
    """One rank's part of a layer's heads, as [first, end) of query heads and of key heads.

    Its query heads share its key heads evenly, as all of them do.
    """

    heads: Run
    kv_heads: Run


class Waves(NamedTuple):
    """The run [begin, end) of the waves, `every` in all, in which a layer's heads are attended to.

    One wave's tokens travel while another is projected or attended to.
    """

    begin: int
    end: int
    every: int

    def share(self, heads: int) -> Run:
        """Its part of so many heads, as [first, end)."""
        return heads * self.begin // self.every, heads * self.end // self.every


@cache
def split(heads: int, kv_heads: int, slices: int, wave: int = 0) -> tuple[Slice, ...]:
    """`slices` slices of a wave's heads, as even as grouped heads allow.

    In order, from one further on in every wave: where slices are uneven, no rank has the largest
    each time. With no more slices than key heads each takes whole groups; with more, several
    share a key head (and each has a copy of it) and split its query heads.

    Raises:
        ValueError: more slices than query heads.
    """
    if slices > heads:
        raise ValueError(f"{heads} heads cannot be split into {slices} slices")
    ratio = heads // kv_heads
    found = []
    for (first, end), sharers in shares(kv_heads, slices):
        if len(sharers) == 1:
            found.append(Slice((first * ratio, end * ratio), (first, end)))
            continue
        for (a, b), holders in shares(ratio, len(sharers)):
            assert len(holders) == 1
            found.append(Slice((first * ratio + a, first * ratio + b), (first, end)))
    shift = wave % slices
    return (*found[shift:], *found[:shift])


@cache
def fractions(
    heads: int, kv_heads: int, slices: int, waves: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """float64 (slices,): the share of all query heads, and of all key heads, in each slice."""
    every = [split(heads // waves, kv_heads // waves, slices, wave) for wave in range(waves)]
    runs = np.array(every, dtype=np.float64)  # (waves, slices, queries or keys, ends)
    queries, keys = np.moveaxis(runs[..., 1] - runs[..., 0], 2, 0).sum(axis=1)
    return queries / heads, keys / kv_heads


def shares(items: int, ranks: int) -> list[tuple[Run, range]]:
    """Runs of items, and the run of ranks that takes each: one rank a run, or one item a run."""
    runs = min(items, ranks)
    return [
        (
            (items * i // runs, items * (i + 1) // runs),
            range(ranks * i // runs, ranks * (i + 1) // runs),
        )
        for i in range(runs)
    ]
