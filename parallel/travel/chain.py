"""The states that enter a rank's fragments whose sequences began elsewhere.

`parallel.planning.passing` says which maps and states travel; here they do. Maps are fp32 (fp64
for fp64 tokens), on the wire too. The backward pass sends gradients the same way from the other
end: dS_in = Mᵀ dS_out + what the fragment's own outputs ask of S_in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.packing import accumulation_dtype
from kernels.segments import apply_segment, compose_segments
from parallel.planning.heads import Run
from parallel.planning.passing import Item, Message, Passing
from parallel.travel.exchange import post

Map = list[Tensor]  # E and M, or E alone where no state enters
Key = tuple[int, int]  # a chain by place, and a fragment's number in it


class Chain(NamedTuple):
    """A sequence in several fragments, as a rank that helps to pass its states sees it.

    Attributes:
        turns: the messages of `passing` that the rank sends or gets.
        rows: in the rank's shard, of each fragment that it holds, by number.
    """

    passing: Passing
    turns: list[list[Message]]
    rows: dict[int, slice]


@dataclass(frozen=True, eq=False)
class Chains:
    """Those that a rank takes part in, alike in order on all ranks, and the same from the end."""

    forward: list[Chain]
    backward: list[Chain]
    rank: int
    group: dist.ProcessGroup | None


class Shapes(NamedTuple):
    """Of a map on the wire."""

    M: torch.Size
    E: torch.Size


class Recurrence(NamedTuple):
    """A linear layer as the chain sees it: functions of its inputs, which are (1, T, …).

    Attributes:
        shapes: of its maps.
        segment: the map (M, E) of all T tokens.
        final_state: of (entering state or None for zero, *inputs), the state after the last
            token, differentiable in the inputs.
    """

    shapes: Callable[..., Shapes]
    segment: Callable[..., tuple[Tensor, Tensor]]
    final_state: Callable[..., Tensor]


class Passage:
    """The states of one layer on their way.

    What is computed after `depart` is computed while what the first of the turns sends travels,
    what after an `advance` while what the next one does, and backward while gradients
    do. (Autograd goes through functions in the reverse of their order.)
    """

    def __init__(
        self, recurrence: Recurrence, chains: Callable[[int], Chains], inputs: Sequence[Any]
    ) -> None:
        self.recurrence, self.shapes = recurrence, recurrence.shapes(*inputs)
        self.chains = chains(self.shapes.E[1])
        first = next(x for x in inputs if x is not None)
        self.like = first.new_empty(0, dtype=accumulation_dtype(first.dtype))
        self.way: _Way
        self.Ms: dict[Key, Tensor] = {}  # until they arrive
        self.states: dict[Key, Tensor] = {}  # of the fragments that they enter; backward
        self.ticket: Tensor

    def advance(self) -> None:
        """Wait for a turn and begin the next one; `arrive` does so with those that are left."""
        self.ticket = _Advance.apply(self, self.ticket)

    def arrive(self, through: Tensor) -> tuple[Tensor, Tensor]:
        """The states that enter, one a fragment that began elsewhere, in the order of the shard.

        Args:
            through: a result of what was computed meanwhile. It is returned as it came, and
                ties the exchange of gradients into the backward pass of every rank, also of
                one that no state enters.
        """
        ticket = self.ticket
        del self.ticket  # which holds on to the passage
        return _Arrive.apply(self, ticket, through)

    def last(self, c: int) -> int:
        return self.chains.forward[c].passing.last


def depart(
    recurrence: Recurrence, chains: Callable[[int], Chains], *inputs: Tensor | None
) -> Passage:
    """Compute the maps of this rank's fragments and send them.

    Args:
        chains: of a number of heads.
        inputs: of the recurrence, for all tokens of the shard. Gradients of the states travel
            to the ranks before and into their inputs.
    """
    passage = Passage(recurrence, chains, inputs)
    passage.ticket = _Depart.apply(passage, *inputs)
    return passage


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passage: Passage, *inputs: Tensor | None) -> Tensor:
        recurrence, chains = passage.recurrence, passage.chains
        own: dict[Key, Map] = {}
        for c, chain in enumerate(chains.forward):
            for number, rows in chain.rows.items():
                if number == 0:
                    own[c, number] = [recurrence.final_state(None, *_rows(inputs, rows))]
                elif number < chain.passing.last:
                    own[c, number] = list(recurrence.segment(*_rows(inputs, rows)))[::-1]
        passage.Ms = {key: tensors[1] for key, tensors in own.items() if len(tensors) > 1}
        passage.way = _Way(chains.forward, own, passage)
        ctx.passage = passage
        ctx.save_for_backward(*inputs)
        return passage.like.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        passage, inputs = ctx.passage, ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        gradients = [torch.zeros_like(x) if i in wanted else None for i, x in enumerate(inputs)]
        for (c, mirrored), dstate in passage.way.states().items():
            number = passage.last(c) - mirrored
            rows = passage.chains.forward[c].rows[number]
            with torch.enable_grad():
                mine = [
                    None if x is None else x.detach().requires_grad_(i in wanted)
                    for i, x in enumerate(_rows(inputs, rows))
                ]
                entering = passage.states.get((c, number))
                final = passage.recurrence.final_state(entering, *mine)
            leaves: list[Any] = [mine[i] for i in wanted]
            found = torch.autograd.grad(final, leaves, dstate, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    _rows(gradients, rows)[i].add_(gradient)
        return None, *gradients


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passage: Passage, ticket: Tensor) -> Tensor:
        ctx.passage = passage
        passage.way.advance()
        return ticket.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Any, ...]:
        ctx.passage.way.advance()
        return None, ticket.new_empty(0)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, passage: Passage, ticket: Tensor, through: Tensor
    ) -> tuple[Tensor, Tensor]:
        found, Ms = passage.way.states(), passage.Ms
        states = torch.cat([*found.values(), passage.like.new_empty(0, *passage.shapes.E[1:])])
        ctx.passage, ctx.entered, ctx.mapped = passage, list(found), list(Ms)
        ctx.save_for_backward(states, *Ms.values())
        passage.Ms = {}
        return through.view_as(through), states

    @staticmethod
    def backward(ctx: Any, dthrough: Tensor, dstates: Tensor) -> tuple[Any, ...]:
        passage: Passage = ctx.passage
        states, *saved = ctx.saved_tensors
        Ms = dict(zip(ctx.mapped, saved, strict=True))
        passage.states = dict(zip(ctx.entered, states.detach().unsqueeze(1), strict=True))
        own: dict[Key, Map] = {}
        for (c, number), dstate in zip(ctx.entered, dstates.unsqueeze(1), strict=True):
            M = Ms.get((c, number))
            transposed = [] if M is None else [M.mT if M.dim() == 4 else M]
            own[c, passage.last(c) - number] = [dstate, *transposed]
        passage.way = _Way(passage.chains.backward, own, passage)
        return None, passage.like.new_empty(0), dthrough


def _rows(inputs: Sequence[Any], rows: slice) -> list[Any]:
    """Those rows; a constant of the layer, with one dimension, has none."""
    return [x if x is None or x.dim() == 1 else x[:, rows] for x in inputs]


class _Way:
    """States that pass one way, forward or backward. The first turn begins at once.

    Args:
        own: maps of this rank's fragments, but of those that are their sequence's last.
    """

    def __init__(self, way: list[Chain], own: dict[Key, Map], passage: Passage) -> None:
        self._way, self._chains = way, passage.chains
        self._shapes, self._like = passage.shapes, passage.like
        heads = (0, passage.shapes.E[1])
        self._have = {(c, ("fragment", n)): (heads, tensors) for (c, n), tensors in own.items()}
        self._turns = zip(*(chain.turns for chain in way), strict=True)
        self._entering: dict[Key, Tensor] = {}
        self._steps = self._pass()
        self.advance()

    def advance(self) -> None:
        """Wait for the turn that is under way, and begin the next one."""
        next(self._steps, None)

    def states(self) -> dict[Key, Tensor]:
        """The states that enter this rank's fragments, in the order of chains and fragments."""
        for _ in self._steps:
            pass
        return self._entering

    def _pass(self) -> Iterator[None]:
        """Stops after each turn is begun."""
        way, have, me = self._way, self._have, self._chains.rank
        arrived = self._turn()
        yield
        maps = arrived()  # of fragments, to be composed by run
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
        maps = arrived()  # of runs
        for c, (passing, *_) in enumerate(way):
            for parts in passing.upper:
                mine = dict(parts).get(me)
                if mine is not None:
                    found = [maps[c, ("run", r)] for r in range(len(passing.runs) - 1)]
                    for r, entry in enumerate(_composed(found), start=1):
                        have[c, ("entry", r)] = mine, entry[:1]
        arrived = self._turn()
        yield
        entries = arrived()
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
        """Begin the next turn; the function returned waits for what it brings to this rank, the
        heads of each item put together."""
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        got: dict[tuple[int, Item], list[Map]] = {}
        me = self._chains.rank
        for c, turn in enumerate(next(self._turns, ())):
            for source, target, item, (a, b), whole in turn:
                if source == me:
                    (first, _), tensors = self._have[c, item]
                    part = [x[:, a - first : b - first].contiguous() for x in tensors[: 1 + whole]]
                    if target != me:
                        sends.setdefault(target, []).extend(part)
                elif target == me:
                    every = (self._shapes.E, self._shapes.M)[: 1 + whole]
                    part = [self._like.new_empty(1, b - a, *shape[2:]) for shape in every]
                    receives.setdefault(source, []).extend(part)
                if target == me:
                    got.setdefault((c, item), []).append(part)
        wait = post(sends, receives, self._chains.group)

        def arrived() -> dict[tuple[int, Item], Map]:
            wait()
            return {
                key: [torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)]
                for key, parts in got.items()
            }

        return arrived


def _composed(maps: list[Map]) -> list[Map]:
    """The first map, the first two composed, the first three, …; E alone if the first one is."""
    if len(maps) < 2:
        return maps
    alone = len(maps[0]) == 1
    E = torch.cat([one[0] for one in maps])
    M = torch.cat([one[-1] for one in [maps[1] if alone else maps[0], *maps[1:]]])
    distance = 1
    while distance < len(maps):
        # M and E come to be of up to twice as many maps, each with those before it.
        later = compose_segments((M[distance:], E[distance:]), (M[:-distance], E[:-distance]))
        M, E = (torch.cat([x[:distance], y]) for x, y in zip((M, E), later, strict=True))
        distance *= 2
    return [[e] if alone else [e, m] for e, m in zip(E.split(1), M.split(1), strict=True)]
