"""The state that enters a fragment whose sequence began on other ranks.

Every rank's part of the sequence acts on the state as S_out = M · S_in + E (kernels.segments).
Ranks compose these maps with those of the rank 1, 2, 4, … before them, so that after
⌈log₂ n⌉ rounds each of the n ranks that share a sequence has composed all that precede it. A
composition that reaches back to the sequence's start acts on the zero state: its E is the
state, and no M travels. Maps are fp32 (fp64 for fp64 tokens) on the wire too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.packing import accumulation_dtype
from kernels.segments import apply_segment, compose_segments
from parallel.exchange import post


class Links(NamedTuple):
    """A rank among those that it shares its outer sequences with.

    Attributes:
        before: ranks that hold earlier tokens of the sequence of this one's first fragment.
        after: ranks that hold later tokens of the sequence of its last fragment.
        through: first and last fragment are one.
    """

    rank: int
    before: int
    after: int
    through: bool

    def mirrored(self) -> Links:
        """The same seen from the other end, as the backward pass goes."""
        return self._replace(before=self.after, after=self.before)


class Shapes(NamedTuple):
    """Of a map on the wire."""

    M: torch.Size
    E: torch.Size


Map = tuple[Tensor | None, Tensor]  # M is None where the zero state enters


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


def enter(
    recurrence: Recurrence,
    links: Links,
    last: int,
    group: dist.ProcessGroup | None,
    through: Tensor,
    *inputs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The state that enters this rank's first fragment.

    Args:
        last: row at which the last fragment begins.
        through: any tensor that the layer goes on to use. It is returned as it came, and ties
            the exchange of gradients into the backward pass of every rank, also of one whose
            own fragments need no state.
        inputs: of the recurrence, for all tokens of the shard.

    Returns:
        `through`, and the state (zero if the first fragment begins its sequence). Gradients of
        the state travel to the ranks before and into their inputs.
    """
    return _Enter.apply(recurrence, links, last, group, through, *inputs)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        links: Links,
        last: int,
        group: dist.ProcessGroup | None,
        through: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tails = _tails(inputs, last)
        shapes = recurrence.shapes(*inputs)
        M, own = None, None
        if links.after:
            M, E = recurrence.segment(*tails)
            own = (M if links.through else None, E)
        state = compose(own, links, 1, shapes, through, group)
        ctx.recurrence, ctx.links, ctx.last, ctx.group = recurrence, links, last, group
        ctx.shapes = shapes
        ctx.save_for_backward(through, M, state, *inputs)
        return through.view_as(through), state

    @staticmethod
    def backward(ctx: Any, dthrough: Tensor, dstate: Tensor) -> tuple[Any, ...]:
        """dS_in = Mᵀ dS_out + what this rank's own outputs ask of S_in: the chain mirrored."""
        through, M, state, *inputs = ctx.saved_tensors
        links: Links = ctx.links
        own: Map | None = None
        if links.before:
            transposed = M.mT.contiguous() if M is not None and M.dim() == 4 else M
            own = (transposed if links.through else None, dstate)
        dleaving = compose(own, links.mirrored(), -1, ctx.shapes, through, ctx.group)
        if not links.after:
            return None, None, None, None, dthrough, *[None] * len(inputs)

        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[5:]) if needed]
        with torch.enable_grad():
            tails = [
                None if x is None else x.detach().requires_grad_(i in wanted)
                for i, x in enumerate(_tails(inputs, ctx.last))
            ]
            final = ctx.recurrence.final_state(state if links.through else None, *tails)
        leaves: list[Any] = [tails[i] for i in wanted]
        found = torch.autograd.grad(final, leaves, dleaving, allow_unused=True)
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                gradients[i] = torch.zeros_like(inputs[i])
                _tails(gradients[i : i + 1], ctx.last)[0].copy_(gradient)
        return None, None, None, None, dthrough, *gradients


def _tails(inputs: Any, last: int) -> list[Any]:
    """The rows from `last` on; a constant of the layer, with one dimension, has no rows."""
    return [x if x is None or x.dim() == 1 else x[:, last:] for x in inputs]


def compose(
    own: Map | None,
    links: Links,
    step: int,
    shapes: Shapes,
    like: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """E of all maps before this rank's composed; zeros if there are none.

    Args:
        own: this rank's map, if any rank comes after it.
        step: 1 if earlier ranks come before, −1 if later ones do.
        like: a tensor of the layer, for device and dtype.
    """
    dtype = accumulation_dtype(like.dtype)
    empty: Callable[[torch.Size], Tensor] = lambda shape: torch.empty(  # noqa: E731
        shape, dtype=dtype, device=like.device
    )
    behind: Map | None = None  # the composition of as many maps before as are known
    distance = 1
    while distance <= max(links.before, links.after):
        sends, receives, arriving = {}, {}, None
        if links.after >= distance:
            assert own is not None
            M, E = _after(own, behind) if links.through else own
            whole = not links.through or links.before < distance
            sends[links.rank + step * distance] = (
                [E.contiguous()] if whole or M is None else [E.contiguous(), M.contiguous()]
            )
        if links.before >= distance:
            # The sender knows the `distance` maps up to its own, or all of them.
            whole = links.before < 2 * distance
            arriving = (None if whole else empty(shapes.M), empty(shapes.E))
            receives[links.rank - step * distance] = [x for x in arriving[::-1] if x is not None]
        post(sends, receives, group)()
        if arriving is not None:
            behind = arriving if behind is None else _after(behind, arriving)
        distance *= 2
    if behind is None:
        return torch.zeros(shapes.E, dtype=dtype, device=like.device)
    return behind[1]


def _after(second: Map, first: Map | None) -> Map:
    if first is None:
        return second
    (M2, E2), (M1, E1) = second, first
    assert M2 is not None
    if M1 is None:
        return None, apply_segment(M2, E2, E1)
    return compose_segments((M2, E2), (M1, E1))
