"""Who tells whom what, so that states pass from fragment to fragment. Knows no torch.

Every fragment of a sequence acts on the state as S_out = M · S_in + E (`kernels.segments`), each
head by itself. What must be found is the state that enters each fragment: the maps before it,
composed. A *run* is fragments that follow one another on one node.

    turn 1, inside nodes    every fragment's map, heads divided over the ranks of its node
            each composes the maps of its heads: those of a run become one
    turn 2, between nodes   every run's map, to who composes these heads' runs
    turn 3, between nodes   the state that enters each run, back
            applied to what was composed before
    turn 4, inside nodes    the state that enters each fragment

So between nodes there goes one map a run, not one a fragment, and over all NICs of the node.
Nothing enters the first fragment, so no M of what begins a sequence travels, and nothing follows
the last one. A sequence of one run needs turns 1 and 4 alone, among the ranks that hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from parallel.planning.heads import Run, shares
from parallel.planning.layout import Topology

TURNS = 4
Kind = Literal["fragment", "run", "entry", "state"]  # "entry": the state of a run
Item = tuple[Kind, int]  # and its number
Part = tuple[int, Run]  # a rank and the heads that it composes


class Message(NamedTuple):
    """Some heads of an item; `whole`: M too, where E alone is not enough."""

    source: int
    target: int
    item: Item
    heads: Run
    whole: bool


class Block(NamedTuple):
    """Items that go to whoever composes their heads, or come from there.

    Attributes:
        kind: of the items.
        numbers, holders: of each item, and the rank that has it or wants it.
        parts: who composes which heads of all of them.
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


class Passing:
    """How the states of one sequence pass.

    Args:
        holders: the rank of each fragment, in the order in which states pass.

    Attributes:
        runs: their fragments, by number.
        parts: of each run, who composes its fragments.
        upper: of each part of the heads, who composes the runs.
    """

    def __init__(self, holders: Sequence[int], heads: int, topology: Topology) -> None:
        self.holders = holders
        each = topology.ranks_per_node
        nodes = [rank // each for rank in holders]
        self.runs: list[list[int]] = [
            list(run) for _, run in groupby(range(len(holders)), key=lambda place: nodes[place])
        ]
        if len(self.runs) == 1:
            self.parts = [_divided(holders[1:], (0, heads))]
            self.upper: list[list[Part]] = []
            return
        # The last node may be a smaller one: as many ranks take part on each.
        width = min(each, *(topology.ranks - node * each for node in set(nodes)))
        first = [each * nodes[run[0]] for run in self.runs]
        self.parts = [_divided(range(rank, rank + width), (0, heads)) for rank in first]
        self.upper = [
            _divided([part[0] for part in parts[1:]], parts[0][1])
            for parts in zip(*self.parts, strict=True)
        ]

    @property
    def last(self) -> int:
        """The last fragment's number."""
        return len(self.holders) - 1

    def turns(self) -> list[list[Message]]:
        """The messages of the four turns; those of a rank to itself are copies."""
        return [[m for block in turn for m in block.messages()] for turn in self.blocks()]

    def blocks(self) -> list[list[Block]]:
        """The same by who composes."""
        numbers = range(len(self.runs))
        maps = [[place for place in run if place < self.last] for run in self.runs]
        states = [[place for place in run if place > 0] for run in self.runs]
        # By part of the heads, of every run: who composes them there.
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


def _divided(ranks: Sequence[int], heads: Run) -> list[Part]:
    """Heads divided over distinct ranks, in the order of heads."""
    distinct = list(dict.fromkeys(ranks))
    first, end = heads
    return [
        (distinct[takers[0]], (first + a, first + b))
        for (a, b), takers in shares(end - first, len(distinct))
    ]
