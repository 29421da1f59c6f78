"""The state that enters a fragment whose sequence began on other ranks.

Every rank's part of the sequence acts on the state as S_out = M · S_in + E (kernels.segments),
each head by itself. The ranks that share a sequence divide its heads: each but the first is
told its heads' maps of all of them, composes these, and tells each rank the state that enters
it. So two messages go between any two of them, whatever their number; together a rank sends
about one map and one state. Nothing enters the first rank, so no M of it travels, and nothing
follows the last. Maps are fp32 (fp64 for fp64 tokens) on the wire too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.packing import accumulation_dtype
from kernels.segments import compose_segments
from parallel.exchange import post
from parallel.heads import shares


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

    @property
    def lead(self) -> int:
        """Ranks that hold earlier tokens of the sequence of its last fragment."""
        return self.before if self.through else 0

    @property
    def trail(self) -> int:
        """Ranks that hold later tokens of the sequence of its first fragment."""
        return self.after if self.through else 0

    def mirrored(self) -> Links:
        """The same seen from the other end, as the backward pass goes."""
        return self._replace(before=self.after, after=self.before)


class Shapes(NamedTuple):
    """Of a map on the wire."""

    M: torch.Size
    E: torch.Size


Map = list[Tensor]  # E and M, or E alone where the zero state enters


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
            own = [E, M] if links.lead else [E]
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
            own = [dstate]
            if links.trail:
                own.append(M.mT if M.dim() == 4 else M)
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
    dtype, heads = accumulation_dtype(like.dtype), shapes.E[1]

    def empty(shape: torch.Size, run: slice) -> Tensor:
        size = (1, run.stop - run.start, *shape[2:])
        return torch.empty(size, dtype=dtype, device=like.device)

    def rank_at(place: int) -> int:  # in the sequence of the first fragment
        return links.rank + step * (place - links.before)

    # This rank's map to those that compose the sequence of its last fragment.
    sends = {}
    if links.after:
        assert own is not None
        for place, run in _composers(links.lead + links.after, heads).items():
            peer = links.rank + step * (place - links.lead)
            sends[peer] = [x[:, run].contiguous() for x in own]
    # What this rank composes itself, of the sequence of its first fragment.
    last = links.before + links.trail
    composers = _composers(last, heads) if links.before else {}
    mine = composers.get(links.before)
    maps: list[Map] = []
    if mine is not None:
        for place in range(last):
            maps.append([empty(shapes.E, mine), *([empty(shapes.M, mine)] if place else [])])
    if links.rank in sends:
        maps[links.before] = sends.pop(links.rank)
    others = [place for place in range(len(maps)) if place != links.before]
    post(sends, {rank_at(place): maps[place] for place in others}, group)()

    states = dict(enumerate(_states(maps), start=1))
    parts = {place: empty(shapes.E, run) for place, run in composers.items()}
    post(
        {rank_at(place): [x] for place, x in states.items() if place != links.before},
        {rank_at(place): [x] for place, x in parts.items() if place != links.before},
        group,
    )()
    if mine is not None:
        parts[links.before] = states[links.before]
    if not parts:
        return torch.zeros(shapes.E, dtype=dtype, device=like.device)
    return torch.cat(list(parts.values()), dim=1)


def _composers(last: int, heads: int) -> dict[int, slice]:
    """The heads of each of the places 1 to `last` that composes any, in the order of heads."""
    return {1 + takers[0]: slice(*run) for run, takers in shares(heads, last)}


def _states(maps: Sequence[Map]) -> Sequence[Tensor]:
    """E of the first map, of the first two composed, of the first three, …"""
    if len(maps) < 2:
        return [E for (E,) in maps]
    E = torch.cat([one[0] for one in maps])
    M = torch.cat([one[-1] for one in [maps[1], *maps[1:]]])  # the first one's is not used
    distance = 1
    while distance < len(maps):
        # M and E come to be of up to twice as many maps, each with those before it.
        later = compose_segments((M[distance:], E[distance:]), (M[:-distance], E[:-distance]))
        M, E = (torch.cat([x[:distance], y]) for x, y in zip((M, E), later, strict=True))
        distance *= 2
    return E.split(1)
