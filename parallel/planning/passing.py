"""Which rank sends what to whom, so that states pass from fragment to fragment. Knows no torch.

A fragment of a sequence acts on each head's state as S_out = M · S_in + E (`kernels.segments`).
Wanted is the state that enters each fragment: a prefix scan over the maps before it. A *run* is
consecutive fragments on one node. The scan has two levels, in four turns of messages:

    turn 1, inside nodes    each fragment's map goes to the ranks of its node, heads divided
            each of these composes its heads' maps; a run's last prefix is the run's map
    turn 2, between nodes   each run's map goes to the rank that composes these heads' runs
            this rank composes the runs' maps: the state that enters each run
    turn 3, between nodes   each of these states goes to the run that it enters
            where the prefixes of turn 1 are applied to it
    turn 4, inside nodes    the state that enters each fragment goes to the fragment's rank

So one map a run crosses between nodes, not one a fragment, and it does so over all NICs of a node.
No M of a sequence's first fragment travels, since nothing enters it, and no map of its last one.
A sequence of one run needs turns 1 and 4 only, among the ranks that hold it. Small states are
composed by fewer ranks, in fewer messages (`least_heads`).

Tried and left: recursive doubling from rank to rank, which sends a whole map and state ⌈log₂ n⌉
times, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from parallel.planning.heads import Run, divide
from parallel.planning.layout import Topology

TURNS = 4
# A map's heads are divided over ranks into messages of at least this many bytes. A smaller one
# takes its latency and little else: between GPUs several microseconds, in which a link of 50 GB/s
# sends some 200 KB; over gloo some hundred.
_LEAST_BYTES = 64 << 10
# A fragment's map, a run's map, the state that enters a run, the state that enters a fragment: what
# turns 1 to 4 send.
Kind = Literal["fragment", "run", "entry", "state"]
Item = tuple[Kind, int]  # one of these, and the number of its fragment or run
Part = tuple[int, Run]  # a rank, and the heads that it composes


class Message(NamedTuple):
    """Some heads of an item, from `source` to `target`: M and E if `whole`, else E or a state."""

    source: int
    target: int
    item: Item
    heads: Run
    whole: bool


class Block(NamedTuple):
    """Items of one kind, gathered by the ranks that compose their heads, or scattered by these.

    Attributes:
        kind: of the items.
        numbers: each item's number.
        holders: each item's rank, which has it before a gather and gets it by a scatter.
        parts: the ranks that compose, and the heads of each.
    """

    kind: Kind
    numbers: Sequence[int]
    holders: Sequence[int]
    parts: list[Part]

    @property
    def gathered(self) -> bool:
        return self.kind in ("fragment", "run")

    def messages(self) -> Iterator[Message]:
        for number, holder in zip(self.numbers, self.holders, strict=True):
            for rank, heads in self.parts:
                item = self.kind, number
                if self.gathered:
                    yield Message(holder, rank, item, heads, number > 0)
                else:
                    yield Message(rank, holder, item, heads, False)


def least_heads(bytes_of_a_head: float) -> int:
    """How many heads a rank composes at least, given the bytes of one head's M and E in fp32."""
    return max(1, math.ceil(_LEAST_BYTES / max(bytes_of_a_head, 1.0)))


class Passing:
    """The messages by which the states of one sequence pass.

    Args:
        holders: the rank of each fragment, in the order in which states pass.
        heads: heads of a state.
        least: heads that a rank composes at least, if there are as many.

    Attributes:
        runs: for each run, the numbers of its fragments.
        parts: for each run, the ranks that compose its fragments' maps, and the heads of each.
        upper: for each of those parts of the heads, the ranks that compose the runs' maps, and the
            heads of each. Empty if there is one run.
    """

    def __init__(
        self, holders: Sequence[int], heads: int, topology: Topology, least: int = 1
    ) -> None:
        self.holders = holders
        nodes = topology.node(np.asarray(holders)).tolist()
        self.runs: list[list[int]] = [
            list(run) for _, run in groupby(range(len(holders)), key=lambda place: nodes[place])
        ]
        if len(self.runs) == 1:
            self.parts = [_divided(holders[1:], (0, heads), least)]
            self.upper: list[list[Part]] = []
            return
        # If a node has fewer ranks than others, only as many take part on every node.
        width = min(topology.sizes[node] for node in set(nodes))
        first = [int(topology.first[nodes[run[0]]]) for run in self.runs]
        self.parts = [_divided(range(rank, rank + width), (0, heads), least) for rank in first]
        self.upper = [
            _divided([part[0] for part in parts[1:]], parts[0][1], least)
            for parts in zip(*self.parts, strict=True)
        ]

    @property
    def last(self) -> int:
        """Number of the last fragment."""
        return len(self.holders) - 1

    def turns(self) -> list[list[Message]]:
        """The messages of each of the four turns; one from a rank to itself is a copy."""
        return [[m for block in turn for m in block.messages()] for turn in self.blocks()]

    def blocks(self) -> list[list[Block]]:
        """The same messages, grouped by the ranks that compose: the blocks of each turn."""
        numbers = range(len(self.runs))
        maps = [[place for place in run if place < self.last] for run in self.runs]
        states = [[place for place in run if place > 0] for run in self.runs]
        # (runs, parts) -> (parts, runs): the ranks that compose a part's heads, one on each run.
        across = [[part[0] for part in parts] for parts in zip(*self.parts, strict=True)]
        above = list(zip(across, self.upper, strict=bool(self.upper)))
        return [
            [self._inside("fragment", x, parts) for x, parts in zip(maps, self.parts, strict=True)],
            [Block("run", numbers[:-1], ranks[:-1], upper) for ranks, upper in above],
            [Block("entry", numbers[1:], ranks[1:], upper) for ranks, upper in above],
            [self._inside("state", x, parts) for x, parts in zip(states, self.parts, strict=True)],
        ]

    def _inside(self, kind: Kind, places: Sequence[int], parts: list[Part]) -> Block:
        return Block(kind, places, [self.holders[place] for place in places], parts)


def _divided(ranks: Sequence[int], heads: Run, least: int) -> list[Part]:
    """Heads divided over the distinct ones of `ranks`, in order; some get none if there are more
    ranks than heads, or if parts would have fewer than `least` heads."""
    first, end = heads
    distinct = list(dict.fromkeys(ranks))[: max(1, (end - first) // least)]
    return [
        (distinct[takers[0]], (first + a, first + b))
        for (a, b), takers in divide(end - first, len(distinct))
    ]
