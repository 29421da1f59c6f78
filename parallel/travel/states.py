"""Passing the states that enter fragments whose sequences began on other ranks.

`parallel.planning.passing` lists the messages that turn the maps of fragments,
S_out = M · S_in + E, into the state that enters each of them; here they are sent. Gradients pass in
the same four turns, from the other end. Maps and states are fp32 (fp64 for fp64 tokens) when they
are sent, too. Shapes, of a sequence: E and S (1, H, Dk, Dv); M (1, H), (1, H, Dk) or
(1, H, Dk, Dk): see `kernels.segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.recurrences import Packed, Shapes
from kernels.segments import apply_segment, compose_segments
from parallel.planning.heads import Run
from parallel.planning.passing import Item, Message, Passing
from parallel.travel.exchange import post

Map = list[Tensor]  # [E, M], or [E] of a fragment that no state enters
Key = tuple[int, int]  # place of a chain in the rank's list, number of a fragment in the chain


class Chain(NamedTuple):
    """A cut sequence, as seen by a rank that takes part in passing its states.

    Attributes:
        turns: for each turn, the messages of `passing` that this rank sends or receives.
        rows: for each fragment that this rank holds, by number, its rows in the rank's shard.
    """

    passing: Passing
    turns: list[list[Message]]
    rows: dict[int, slice]


class Group(NamedTuple):
    """This rank's fragments of one kind: middle, last or first ones. They lie end to end.

    Attributes:
        keys: of each, in the order of the shard.
        rows: of all, in the shard.
    """

    keys: list[Key]
    rows: slice
    segments: Packed

    def each(self, x: Tensor) -> dict[Key, Tensor]:
        """(N, …) -> (1, …) of each fragment."""
        return dict(zip(self.keys, x.split(1), strict=True))

    def gathered(self, x: dict[Key, Tensor]) -> Tensor:
        """(1, …) of each fragment -> (N, …)."""
        return torch.cat([x[key] for key in self.keys])


@dataclass(frozen=True, eq=False)
class Chains:
    """The chains that this rank takes part in, in the same order on every rank.

    Attributes:
        forward: the chains.
        backward: the same, with their fragments numbered from the last to the first.
        middle, last, first: this rank's fragments by kind; None if it has none.
    """

    forward: list[Chain]
    backward: list[Chain]
    middle: Group | None
    last: Group | None
    first: Group | None
    rank: int
    group: dist.ProcessGroup | None

    def mirrored(self, key: Key) -> Key:
        """The key of a fragment of `forward` in `backward`, and the other way round."""
        c, number = key
        return c, self.forward[c].passing.last - number


class OneWay:
    """One pass of states along the chains, forward or backward. The first turn begins at once.

    Args:
        way: the chains, fragments numbered in the direction of this pass.
        own: maps of this rank's fragments, without those that are the last of their chain.
        shapes: of maps with all heads.
        like: a tensor of the dtype and device of states.
    """

    def __init__(
        self, way: list[Chain], own: dict[Key, Map], chains: Chains, shapes: Shapes, like: Tensor
    ) -> None:
        self._way, self._chains, self._shapes, self._like = way, chains, shapes, like
        heads = (0, shapes.E[1])
        self._have = {(c, ("fragment", n)): (heads, tensors) for (c, n), tensors in own.items()}
        self._turns = zip(*(chain.turns for chain in way), strict=True)
        self._entering: dict[Key, Tensor] = {}
        self._steps = self._pass()
        self.advance()

    def advance(self) -> None:
        """Wait for the turn under way, and begin the next."""
        next(self._steps, None)

    def states(self) -> dict[Key, Tensor]:
        """Finish all turns: the states that enter this rank's fragments, by chain and fragment."""
        for _ in self._steps:
            pass
        return self._entering

    def _pass(self) -> Iterator[None]:
        """The four turns of `planning.passing`; yields whenever one has begun."""
        way, have, me = self._way, self._have, self._chains.rank
        arrived = self._turn()
        yield
        maps = arrived()  # of fragments: compose each run's
        composed: dict[Key, tuple[Run, list[Map]]] = {}
        for c, (passing, *_) in enumerate(way):
            for r, (run, parts) in enumerate(zip(passing.runs, passing.parts, strict=True)):
                mine = dict(parts).get(me)
                if mine is not None:
                    found = [maps[c, ("fragment", n)] for n in run if n < passing.last]
                    composed[c, r] = mine, _composed(found)
                    if r < len(passing.runs) - 1:
                        have[c, ("run", r)] = mine, composed[c, r][1][-1]
        arrived = self._turn()
        yield
        maps = arrived()  # of runs: compose these
        for c, (passing, *_) in enumerate(way):
            for parts in passing.upper:
                mine = dict(parts).get(me)
                if mine is not None:
                    found = [maps[c, ("run", r)] for r in range(len(passing.runs) - 1)]
                    for r, entry in enumerate(_composed(found), start=1):
                        have[c, ("entry", r)] = mine, entry[:1]
        arrived = self._turn()
        yield
        entries = arrived()  # the states that enter runs: apply each run's prefixes to them
        for (c, r), (mine, found) in composed.items():
            run = way[c].passing.runs[r]
            states = [E for E, *_ in found]
            if r > 0:
                (S,) = entries[c, ("entry", r)]
                states = [S, *(apply_segment(M, E, S) for E, M in found)]
            for n, state in zip(run if r > 0 else run[1:], states, strict=False):
                have[c, ("state", n)] = mine, [state]
        arrived = self._turn()
        yield
        came = arrived()
        self._entering = {
            (c, n): came[c, ("state", n)][0]
            for c, chain in enumerate(way)
            for n in chain.rows
            if n > 0
        }

    def _turn(self) -> Callable[[], dict[tuple[int, Item], Map]]:
        """Begin the next turn: one message to each rank that gets anything. The function returned
        waits for what it brings to this rank: each item's tensors, with the heads from all its
        senders concatenated."""
        me = self._chains.rank
        sends: dict[int, list[Tensor]] = {}  # to this rank itself: copies
        receives: dict[int, list[torch.Size]] = {}
        takes: list[tuple[tuple[int, Item], int, int]] = []  # what, from whom, how many tensors
        for c, turn in enumerate(next(self._turns, ())):
            for source, target, item, (a, b), whole in turn:
                if source == me:
                    (first, _), tensors = self._have[c, item]
                    # (1, heads here, …) -> (1, b − a, …)
                    part = [x[:, a - first : b - first] for x in tensors[: 1 + whole]]
                    sends.setdefault(target, []).extend(part)
                elif target == me:
                    shapes = (self._shapes.E, self._shapes.M)[: 1 + whole]
                    receives.setdefault(source, []).extend(
                        torch.Size((1, b - a, *shape[2:])) for shape in shapes
                    )
                if target == me:
                    takes.append(((c, item), source, 1 + whole))
        came = {me: iter(sends.pop(me, []))}
        buffers = {
            source: self._like.new_empty(sum(shape.numel() for shape in shapes))
            for source, shapes in receives.items()
        }
        wait = post(
            {target: [torch.cat([x.flatten() for x in parts])] for target, parts in sends.items()},
            {source: [buffer] for source, buffer in buffers.items()},
            self._chains.group,
        )

        def arrived() -> dict[tuple[int, Item], Map]:
            wait()
            for source, shapes in receives.items():
                flat = buffers[source].split([shape.numel() for shape in shapes])
                came[source] = iter([x.view(shape) for x, shape in zip(flat, shapes, strict=True)])
            got: dict[tuple[int, Item], list[Map]] = {}
            for key, source, count in takes:
                got.setdefault(key, []).append([next(came[source]) for _ in range(count)])
            return {
                key: [
                    pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
                    for pieces in zip(*parts, strict=True)
                ]
                for key, parts in got.items()
            }

        return arrived


def _composed(maps: list[Map]) -> list[Map]:
    """Inclusive prefix scan: the first map, the first two composed, the first three, ….

    By recursive doubling, log₂ n steps over all maps at once. If the first map is E alone, the
    results are.
    """
    if len(maps) < 2:
        return maps
    alone = len(maps[0]) == 1
    E = torch.cat([one[0] for one in maps])  # n of (1, h, Dk, Dv) -> (n, h, Dk, Dv)
    # If the first map has no M, another stands in for it; what it makes is not used.
    M = torch.cat([one[-1] for one in [maps[1] if alone else maps[0], *maps[1:]]])  # (n, h, …)
    distance = 1
    while distance < len(maps):
        # Map i now composes the last `distance` maps up to i; then twice as many.
        later = compose_segments((M[distance:], E[distance:]), (M[:-distance], E[:-distance]))
        M, E = (torch.cat([x[:distance], y]) for x, y in zip((M, E), later, strict=True))
        distance *= 2
    return [[e] if alone else [e, m] for e, m in zip(E.split(1), M.split(1), strict=True)]
