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
def split(heads: int, kv_heads: int, slices: int) -> tuple[Slice, ...]:
    """`slices` slices of the heads, in order, as even as grouped heads allow.

    With no more slices than key heads each takes whole groups; with more, several share a key
    head (and each has a copy of it) and split its query heads.

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
    return tuple(found)


@cache
def fractions(heads: int, kv_heads: int, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 (slices,): the share of all query heads, and of all key heads, in each slice."""
    every = split(heads, kv_heads, slices)
    return (
        np.array([(b - a) / heads for (a, b), _ in every]),
        np.array([(b - a) / kv_heads for _, (a, b) in every]),
    )


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
