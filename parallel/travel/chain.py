"""The states that enter fragments whose sequences began on other ranks.

A *chain* is the fragments of one sequence, in order. `parallel.planning.passing` lists the
messages that turn its maps S_out = M · S_in + E into the state that enters each fragment; here they
are sent. The backward pass goes along the chain from its other end, in the same four turns:

    dS_in = Mᵀ dS_out + E',   E' the gradient of S_in from the fragment's own outputs

Maps and states are fp32 (fp64 for fp64 tokens) when they are sent, too. Shapes, of a sequence:
E and S (1, H, Dk, Dv); M (1, H), (1, H, Dk) or (1, H, Dk, Dk): see `kernels.segments`.
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


@dataclass(frozen=True, eq=False)
class Chains:
    """The chains that this rank takes part in, in the same order on every rank.

    `backward` holds the same chains with their fragments numbered from the last to the first.
    """

    forward: list[Chain]
    backward: list[Chain]
    rank: int
    group: dist.ProcessGroup | None


class Shapes(NamedTuple):
    """Shapes of M and E as they are sent, with all heads of one sequence."""

    M: torch.Size
    E: torch.Size


class Recurrence(NamedTuple):
    """A linear layer's recurrence: functions of its inputs, each (1, T, …), or (H,) if constant.

    Attributes:
        shapes: inputs -> shapes of their maps.
        segment: inputs -> (M, E), the map of all T tokens.
        final_state: (state that enters, or None for zeros; *inputs) -> state after the last token;
            differentiable in the inputs.
    """

    shapes: Callable[..., Shapes]
    segment: Callable[..., tuple[Tensor, Tensor]]
    final_state: Callable[..., Tensor]


class StateTransfer:
    """The passing of one layer's states, begun by `begin_states` and ended by `arrive`.

    Work after `begin_states` overlaps the messages of the first turn, work after each `advance`
    those of the next turn. In the backward pass too, where autograd runs functions in reverse: the
    gradients of that work are computed while gradients of states travel.
    """

    def __init__(
        self, recurrence: Recurrence, chains: Callable[[int], Chains], inputs: Sequence[Any]
    ) -> None:
        self.recurrence, self.shapes = recurrence, recurrence.shapes(*inputs)
        self.chains = chains(self.shapes.E[1])
        first = next(x for x in inputs if x is not None)
        self.like = first.new_empty(0, dtype=accumulation_dtype(first.dtype))
        self.way: _OneWay  # the pass under way, forward or backward
        self.Ms: dict[Key, Tensor] = {}  # this rank's, from `begin_states` to `arrive`
        self.states: dict[Key, Tensor] = {}  # that entered this rank's fragments; for backward
        self.ticket: Tensor

    def advance(self) -> None:
        """Wait for the turn under way and begin the next; `arrive` does this for all left over."""
        self.ticket = _Advance.apply(self, self.ticket)

    def arrive(self, through: Tensor) -> tuple[Tensor, Tensor]:
        """Wait for the states that enter this rank's fragments.

        Args:
            through: a result of the work in between. It is returned unchanged; through it the
                backward pass of every rank reaches the exchange of gradients, even of a rank
                that no state enters.

        Returns:
            `through`, and the states (fragments, H, Dk, Dv) of the fragments that continue a
            sequence, in the order of the shard.
        """
        ticket = self.ticket
        del self.ticket  # its graph refers to this object: a cycle that would keep both alive
        return _Arrive.apply(self, ticket, through)

    def last(self, c: int) -> int:
        return self.chains.forward[c].passing.last


def begin_states(
    recurrence: Recurrence, chains: Callable[[int], Chains], *inputs: Tensor | None
) -> StateTransfer:
    """Compute the maps of this rank's fragments and begin to send them.

    Args:
        chains: number of heads -> the chains of this rank.
        inputs: of the recurrence, (1, t, …) for the t tokens of the shard. They get the gradients
            of the states that other ranks receive from here.
    """
    transfer = StateTransfer(recurrence, chains, inputs)
    transfer.ticket = _Begin.apply(transfer, *inputs)
    return transfer


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: StateTransfer, *inputs: Tensor | None) -> Tensor:
        recurrence, chains = transfer.recurrence, transfer.chains
        own: dict[Key, Map] = {}
        for c, chain in enumerate(chains.forward):
            for number, rows in chain.rows.items():
                if number == 0:
                    own[c, number] = [recurrence.final_state(None, *_rows(inputs, rows))]
                elif number < chain.passing.last:
                    own[c, number] = list(recurrence.segment(*_rows(inputs, rows)))[::-1]
        transfer.Ms = {key: tensors[1] for key, tensors in own.items() if len(tensors) > 1}
        transfer.way = _OneWay(chains.forward, own, transfer)
        ctx.transfer = transfer
        ctx.save_for_backward(*inputs)
        return transfer.like.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        transfer, inputs = ctx.transfer, ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        gradients = [torch.zeros_like(x) if i in wanted else None for i, x in enumerate(inputs)]
        for (c, mirrored), dstate in transfer.way.states().items():
            number = transfer.last(c) - mirrored
            rows = transfer.chains.forward[c].rows[number]
            with torch.enable_grad():
                mine = [
                    None if x is None else x.detach().requires_grad_(i in wanted)
                    for i, x in enumerate(_rows(inputs, rows))
                ]
                entering = transfer.states.get((c, number))
                final = transfer.recurrence.final_state(entering, *mine)
            leaves: list[Any] = [mine[i] for i in wanted]
            found = torch.autograd.grad(final, leaves, dstate, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    _rows(gradients, rows)[i].add_(gradient)
        return None, *gradients


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: StateTransfer, ticket: Tensor) -> Tensor:
        ctx.transfer = transfer
        transfer.way.advance()
        return ticket.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Any, ...]:
        ctx.transfer.way.advance()
        return None, ticket.new_empty(0)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transfer: StateTransfer, ticket: Tensor, through: Tensor
    ) -> tuple[Tensor, Tensor]:
        found, Ms = transfer.way.states(), transfer.Ms
        states = torch.cat([*found.values(), transfer.like.new_empty(0, *transfer.shapes.E[1:])])
        ctx.transfer, ctx.entered, ctx.mapped = transfer, list(found), list(Ms)
        ctx.save_for_backward(states, *Ms.values())
        transfer.Ms = {}
        return through.view_as(through), states

    @staticmethod
    def backward(ctx: Any, dthrough: Tensor, dstates: Tensor) -> tuple[Any, ...]:
        transfer: StateTransfer = ctx.transfer
        states, *saved = ctx.saved_tensors
        Ms = dict(zip(ctx.mapped, saved, strict=True))
        transfer.states = dict(zip(ctx.entered, states.detach().unsqueeze(1), strict=True))
        own: dict[Key, Map] = {}
        # (fragments, H, Dk, Dv) -> (1, H, Dk, Dv) each
        for (c, number), dstate in zip(ctx.entered, dstates.unsqueeze(1), strict=True):
            M = Ms.get((c, number))
            transposed = [] if M is None else [M.mT if M.dim() == 4 else M]
            own[c, transfer.last(c) - number] = [dstate, *transposed]
        transfer.way = _OneWay(transfer.chains.backward, own, transfer)
        return None, transfer.like.new_empty(0), dthrough


def _rows(inputs: Sequence[Any], rows: slice) -> list[Any]:
    """(1, t, …) -> (1, rows, …) for each input; a constant (H,) and None stay as they are."""
    return [x if x is None or x.dim() == 1 else x[:, rows] for x in inputs]


class _OneWay:
    """One pass of states along the chains, forward or backward. The first turn begins at once.

    Args:
        way: the chains, fragments numbered in the direction of this pass.
        own: maps of this rank's fragments, without those that are the last of their chain.
    """

    def __init__(self, way: list[Chain], own: dict[Key, Map], transfer: StateTransfer) -> None:
        self._way, self._chains = way, transfer.chains
        self._shapes, self._like = transfer.shapes, transfer.like
        heads = (0, transfer.shapes.E[1])
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
        """Begin the next turn. The function returned waits for what it brings to this rank: each
        item's tensors, with the heads from all its senders concatenated."""
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        got: dict[tuple[int, Item], list[Map]] = {}
        me = self._chains.rank
        for c, turn in enumerate(next(self._turns, ())):
            for source, target, item, (a, b), whole in turn:
                if source == me:
                    (first, _), tensors = self._have[c, item]
                    # (1, heads here, …) -> (1, b − a, …)
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
