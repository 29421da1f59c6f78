"""Linear layers over cut sequences: the op on each fragment, while states pass between them.

A *chain* is the fragments of one sequence, in order. The states that enter them are passed as
`travel.states` says; in the backward pass their gradients, from the other end of the chain:

    dS_in = Mᵀ dS_out + Rᵀ do        (R, M, E and the steps of the op: `kernels.recurrences`)

                        forward                             backward
    first fragment      the op; its final state leaves      waits for dS_out, then runs once
    middle ones         begins, and computes its maps;      Rᵀ do, at once; waits for dS_out, then
                        finishes with S_in                  runs once
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
from kernels.recurrences import Begun, Inputs, Kept, Pass, Recurrence
from parallel.planning.passing import least_heads
from parallel.travel.states import Chain, Chains, Key, Map, OneWay


class StateTransfer:
    """One layer's op over cut sequences, begun by `begin_states` and ended by `arrive`.

    Work after `begin_states` overlaps the messages of the first turn, work after each `advance`
    those of the next turn. In the backward pass too, where autograd runs functions in reverse: the
    gradients of that work are computed while gradients of states travel.
    """

    def __init__(
        self, recurrence: Recurrence, chains: Callable[[int, int], Chains], inputs: Sequence[Any]
    ) -> None:
        self.recurrence, self.shapes = recurrence, recurrence.shapes(tuple(inputs))
        (M, E), heads = self.shapes, self.shapes.E[1]
        self.chains = chains(heads, least_heads(4 * (M.numel() + E.numel()) / heads))
        first = next(x for x in inputs if x is not None)
        self.like = first.new_empty(0, dtype=accumulation_dtype(first.dtype))
        self.way: OneWay  # the pass under way, forward or backward
        self.started: _Started | None = None  # from `begin_states` to `arrive`
        self.left: _Left | None = None  # in the backward pass, from `arrive` to `begin_states`
        self.ticket: Tensor

    def begin_way(self, way: list[Chain], own: dict[Key, Map]) -> None:
        """Begin to send the maps of this rank's fragments: see `OneWay`."""
        self.way = OneWay(way, own, self.chains, self.shapes, self.like)

    def advance(self) -> None:
        """Wait for the turn under way and begin the next; `arrive` does this for all left over."""
        self.ticket = _Advance.apply(self, self.ticket)

    def arrive(self, through: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for the states that enter this rank's fragments, and finish the op.

        Args:
            through: a result of the work in between. It is returned unchanged; through it the
                backward pass of every rank reaches the exchange of gradients, even of a rank
                without a cut sequence.

        Returns:
            `through`, and the op's outputs (1, t, …) of the fragments that continue a sequence and
            of the first ones; (0,) if t is 0.
        """
        ticket = self.ticket
        del self.ticket  # its graph refers to this object: a cycle that would keep both alive
        return _Arrive.apply(self, ticket, through)


class _Started(NamedTuple):
    continued: Inputs
    middle: Begun | None
    first: Pass | None


class _Left(NamedTuple):
    """What is left to do in the backward pass when gradients of states have arrived."""

    do: Tensor | None  # of middle fragments
    state: Tensor | None  # that entered them
    kept: Kept  # for their backward pass
    pending: tuple[Any, ...]  # from its beginning
    last: list[Tensor | None]  # gradients of the last fragments' inputs
    do_first: Tensor  # of first fragments


def begin_states(
    recurrence: Recurrence, chains: Callable[[int, int], Chains], continued: Inputs, first: Inputs
) -> StateTransfer:
    """Begin the op over cut sequences: compute what leaves this rank's fragments, and send it.

    Args:
        chains: `View.chains`.
        continued: inputs of the recurrence, (1, t, …) for the t tokens of the rank's fragments
            that continue a sequence, or (H,) if constant.
        first: the same for its first fragments.
    """
    transfer = StateTransfer(recurrence, chains, continued)
    transfer.ticket = _Begin.apply(transfer, *continued, *first)
    return transfer


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: StateTransfer, *inputs: Tensor | None) -> Tensor:
        recurrence, chains = transfer.recurrence, transfer.chains
        continued, firsts = _halves(inputs)
        own: dict[Key, Map] = {}
        middle = first = None
        if chains.middle:
            of = chains.middle
            middle = recurrence.begin(_rows(continued, of.rows), of.segments)
            Ms = of.each(middle.M)
            own |= {key: [E, Ms[key]] for key, E in of.each(middle.E).items()}
        if chains.first:
            first = recurrence.forward(firsts, chains.first.segments, None)
            own |= {key: [E] for key, E in chains.first.each(first.state).items()}
        transfer.begin_way(chains.forward, own)
        transfer.started = _Started(continued, middle, first)
        ctx.transfer, ctx.count = transfer, len(inputs)
        ctx.save_for_backward(*inputs, *_detached(first.kept if first else ()))
        return transfer.like.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        transfer: StateTransfer = ctx.transfer
        recurrence, chains = transfer.recurrence, transfer.chains
        saved = ctx.saved_tensors  # read once: under activation checkpointing it may be only once
        continued, firsts = _halves(saved[: ctx.count])
        dstates = {chains.mirrored(key): dS for key, dS in transfer.way.states().items()}
        left, transfer.left = transfer.left, None
        assert left is not None
        found = [left.last] if chains.last else []
        if chains.middle and left.do is not None and left.state is not None:
            of = chains.middle
            gradients = recurrence.finish_backward(
                _rows(continued, of.rows), of.segments, left.state, left.kept, left.do,
                left.pending, of.gathered(dstates),
            )  # fmt: skip
            found.insert(0, gradients)
        of_first: list[Tensor | None] = [None if x is None else torch.zeros_like(x) for x in firsts]
        if chains.first:
            of = chains.first
            of_first, _dS = recurrence.backward(
                firsts, of.segments, None, saved[ctx.count :], left.do_first, of.gathered(dstates)
            )
        parts = [[gradients[i] for gradients in found] for i in range(len(continued))]
        of_continued = [_joined(x, part) for x, part in zip(continued, parts, strict=True)]
        return None, *of_continued, *of_first


def _halves(inputs: Sequence[Any]) -> tuple[Inputs, Inputs]:
    middle = len(inputs) // 2
    return tuple(inputs[:middle]), tuple(inputs[middle:])


def _detached(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As they are saved: an output that refers to its own graph would keep it alive."""
    return [None if x is None else x.detach() for x in tensors]


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    """(1, t, …) -> (1, rows, …) for each input; a constant (H,) and None stay as they are."""
    return tuple(x if x is None or x.dim() == 1 else x[:, rows] for x in inputs)


def _joined(x: Tensor | None, parts: list[Any]) -> Any:
    """The gradient of an input, given those of its groups of rows; of a constant their sum."""
    if x is None or not parts:
        return None if x is None else torch.zeros_like(x)
    if len(parts) == 1:
        return parts[0]
    return parts[0] + parts[1] if x.dim() == 1 else torch.cat(parts, dim=1)


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        recurrence, chains = transfer.recurrence, transfer.chains
        states, started = transfer.way.states(), transfer.started
        assert started is not None
        transfer.started = None
        outputs: list[Tensor] = []
        saved: list[Any] = []
        if chains.middle and started.middle:
            of, inputs = chains.middle, _rows(started.continued, chains.middle.rows)
            S = of.gathered(states)
            o, kept = recurrence.finish(inputs, of.segments, started.middle, S)
            outputs.append(o)
            saved += [S, started.middle.M, *inputs, *kept]
        ctx.of_middle = len(saved)
        if chains.last:
            of, inputs = chains.last, _rows(started.continued, chains.last.rows)
            S = of.gathered(states)
            done = recurrence.forward(inputs, of.segments, S)
            outputs.append(done.o)
            saved += [S, *inputs, *done.kept]
        ctx.transfer, ctx.count = transfer, len(started.continued)
        ctx.save_for_backward(*_detached(saved))
        none = transfer.like.new_empty(0)
        o = none if not outputs else outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return through.view_as(through), o, started.first.o if started.first else none.clone()

    @staticmethod
    def backward(ctx: Any, dthrough: Tensor, do: Tensor, do_first: Tensor) -> tuple[Any, ...]:
        transfer: StateTransfer = ctx.transfer
        recurrence, chains = transfer.recurrence, transfer.chains
        saved = ctx.saved_tensors
        own: dict[Key, Map] = {}
        do_middle = state = None
        kept: Kept = ()
        pending: tuple[Any, ...] = ()
        last: list[Tensor | None] = []
        if chains.middle:
            of = chains.middle
            state, M, *rest = saved[: ctx.of_middle]
            inputs, kept = tuple(rest[: ctx.count]), tuple(rest[ctx.count :])
            do_middle = do[:, of.rows]
            entering, pending = recurrence.begin_backward(inputs, of.segments, kept, do_middle)
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
        transfer.left = _Left(do_middle, state, kept, pending, last, do_first)
        transfer.begin_way(chains.backward, own)
        return None, transfer.like.new_empty(0), dthrough
