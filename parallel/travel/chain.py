"""Linear layers over cut sequences: the op on each fragment, while states pass between them.

A *chain* is the fragments of one sequence, in order. The states that enter them are passed as
`travel.states` says; in the backward pass their gradients, from the other end of the chain:

    dS_in = Mᵀ dS_out + Rᵀ do        (R, M, E and the steps of the op: `kernels.recurrences`)

                        forward                             backward
    first fragment      the op; its final state leaves      waits for dS_out, then runs once
    middle ones         the op from zeros, and its maps;    Rᵀ do, at once; waits for dS_out, then
                        then adds R · S_in to o             runs once
    last fragment       waits for S_in, then the op         runs once; its dS_in leaves

So only middle fragments do more than a whole sequence would: they compute R and M. That the last
one waits delays it by one op, not by one a layer, since no other fragment waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.packing import accumulation_dtype
from kernels.recurrences import Kept, Mapped, Pass, Recurrence
from parallel.travel.states import Chain, Chains, Key, Map, OneWay


class StateTransfer:
    """One layer's op over cut sequences, begun by `begin_states` and ended by `arrive`.

    Work after `begin_states` overlaps the messages of the first turn, work after each `advance`
    those of the next turn. In the backward pass too, where autograd runs functions in reverse: the
    gradients of that work are computed while gradients of states travel.
    """

    def __init__(
        self, recurrence: Recurrence, chains: Callable[[int], Chains], inputs: Sequence[Any]
    ) -> None:
        self.recurrence, self.shapes = recurrence, recurrence.shapes(tuple(inputs))
        self.chains = chains(self.shapes.E[1])
        first = next(x for x in inputs if x is not None)
        self.like = first.new_empty(0, dtype=accumulation_dtype(first.dtype))
        self.way: OneWay  # the pass under way, forward or backward
        self.begun: _Begun | None = None  # from `begin_states` to `arrive`
        self.left: _Left | None = None  # in the backward pass, from `arrive` to `begin_states`
        self.ticket: Tensor

    def begin_way(self, way: list[Chain], own: dict[Key, Map]) -> None:
        """Begin to send the maps of this rank's fragments: see `OneWay`."""
        self.way = OneWay(way, own, self.chains, self.shapes, self.like)

    def advance(self) -> None:
        """Wait for the turn under way and begin the next; `arrive` does this for all left over."""
        self.ticket = _Advance.apply(self, self.ticket)

    def arrive(self, through: Tensor) -> tuple[Tensor, Tensor]:
        """Wait for the states that enter this rank's fragments, and finish the op.

        Args:
            through: a result of the work in between. It is returned unchanged; through it the
                backward pass of every rank reaches the exchange of gradients, even of a rank
                without a cut sequence.

        Returns:
            `through`, and the op's outputs (1, t, …); (0,) if t is 0.
        """
        ticket = self.ticket
        del self.ticket  # its graph refers to this object: a cycle that would keep both alive
        return _Arrive.apply(self, ticket, through)


class _Begun(NamedTuple):
    inputs: tuple[Any, ...]
    middle: Mapped | None
    first: Pass | None


class _Left(NamedTuple):
    """What is left to do in the backward pass when gradients of states have arrived."""

    do: Tensor
    last: list[Tensor | None]  # gradients of the last fragments' inputs
    state: Tensor | None  # that entered the middle fragments
    kept: Kept  # for their backward pass


def begin_states(
    recurrence: Recurrence, chains: Callable[[int], Chains], *inputs: Tensor | None
) -> StateTransfer:
    """Begin the op over cut sequences: compute what leaves this rank's fragments, and send it.

    Args:
        chains: number of heads -> the chains of this rank.
        inputs: of the recurrence, (1, t, …) for the t tokens in the shard's cut sequences, or (H,)
            if constant.
    """
    transfer = StateTransfer(recurrence, chains, inputs)
    transfer.ticket = _Begin.apply(transfer, *inputs)
    return transfer


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: StateTransfer, *inputs: Tensor | None) -> Tensor:
        recurrence, chains = transfer.recurrence, transfer.chains
        own: dict[Key, Map] = {}
        middle = first = None
        if chains.middle:
            of = chains.middle
            middle = recurrence.forward_with_maps(_rows(inputs, of.rows), of.segments)
            Ms = of.each(middle.M)
            own |= {key: [E, Ms[key]] for key, E in of.each(middle.E).items()}
        if chains.first:
            of = chains.first
            first = recurrence.forward(_rows(inputs, of.rows), of.segments, None)
            own |= {key: [E] for key, E in of.each(first.state).items()}
        transfer.begin_way(chains.forward, own)
        transfer.begun = _Begun(inputs, middle, first)
        ctx.transfer, ctx.count = transfer, len(inputs)
        ctx.save_for_backward(*inputs, *(first.kept if first else ()))
        return transfer.like.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        transfer: StateTransfer = ctx.transfer
        recurrence, chains = transfer.recurrence, transfer.chains
        inputs, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        dstates = {chains.mirrored(key): dS for key, dS in transfer.way.states().items()}
        left, transfer.left = transfer.left, None
        assert left is not None
        found = [left.last] if chains.last else []
        if chains.middle:
            of = chains.middle
            gradients, _dS = recurrence.backward(
                _rows(inputs, of.rows), of.segments, left.state, left.kept,
                left.do[:, of.rows], of.gathered(dstates),
            )  # fmt: skip
            found.insert(0, gradients)
        if chains.first:
            of = chains.first
            gradients, _dS = recurrence.backward(
                _rows(inputs, of.rows), of.segments, None, kept,
                left.do[:, of.rows], of.gathered(dstates),
            )  # fmt: skip
            found.append(gradients)
        return None, *(
            _joined(x, [gradients[i] for gradients in found]) if needed else None
            for i, (x, needed) in enumerate(zip(inputs, ctx.needs_input_grad[1:], strict=True))
        )


def _joined(x: Tensor, parts: list[Any]) -> Tensor:
    """The gradient of an input, given those of its groups of rows; of a constant their sum."""
    if not parts:
        return torch.zeros_like(x)
    return torch.stack(parts).sum(0) if x.dim() == 1 else torch.cat(parts, dim=1)


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
        recurrence, chains = transfer.recurrence, transfer.chains
        states, begun = transfer.way.states(), transfer.begun
        assert begun is not None
        transfer.begun = None
        outputs: list[Tensor] = []
        saved: list[Any] = []
        if chains.middle and begun.middle:
            of = chains.middle
            S = of.gathered(states)
            o, kept = recurrence.enter(_rows(begun.inputs, of.rows), of.segments, begun.middle, S)
            outputs.append(o)
            saved += [S, begun.middle.R, begun.middle.M, *kept]
        ctx.of_middle = len(saved)
        if chains.last:
            of = chains.last
            S, inputs = of.gathered(states), _rows(begun.inputs, of.rows)
            done = recurrence.forward(inputs, of.segments, S)
            outputs.append(done.o)
            saved += [S, *inputs, *done.kept]
        if begun.first:
            outputs.append(begun.first.o)
        ctx.transfer, ctx.count = transfer, len(begun.inputs)
        ctx.save_for_backward(*(None if x is None else x.detach() for x in saved))
        o = torch.cat(outputs, dim=1) if outputs else transfer.like.new_empty(0)
        return through.view_as(through), o

    @staticmethod
    def backward(ctx: Any, dthrough: Tensor, do: Tensor) -> tuple[Any, ...]:
        transfer: StateTransfer = ctx.transfer
        recurrence, chains = transfer.recurrence, transfer.chains
        saved = ctx.saved_tensors
        own: dict[Key, Map] = {}
        state, kept = None, ()
        last: list[Tensor | None] = []
        if chains.middle:
            of = chains.middle
            state, R, M, *kept = saved[: ctx.of_middle]
            entering = recurrence.entering_gradient(of.segments, R, do[:, of.rows])
            Ms = of.each(M.mT if M.dim() == 4 else M)
            own |= {chains.mirrored(k): [E, Ms[k]] for k, E in of.each(entering).items()}
        if chains.last:
            of = chains.last
            S, *rest = saved[ctx.of_middle :]
            last, dS = recurrence.backward(
                tuple(rest[: ctx.count]), of.segments, S, tuple(rest[ctx.count :]),
                do[:, of.rows], None,
            )  # fmt: skip
            assert dS is not None
            own |= {chains.mirrored(k): [E] for k, E in of.each(dS).items()}
        transfer.left = _Left(do, last, state, tuple(kept))
        transfer.begin_way(chains.backward, own)
        return None, transfer.like.new_empty(0), dthrough


def _rows(inputs: Sequence[Any], rows: slice) -> tuple[Any, ...]:
    """(1, t, …) -> (1, rows, …) for each input; a constant (H,) and None stay as they are."""
    return tuple(x if x is None or x.dim() == 1 else x[:, rows] for x in inputs)
