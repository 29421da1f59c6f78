"""The states that enter a rank's fragments whose sequences began elsewhere.

`parallel.passing` says which maps and states travel; here they do. Maps are fp32 (fp64 for fp64
tokens), on the wire too. The backward pass sends gradients the same way from the other end:
dS_in = Mᵀ dS_out + what the fragment's own outputs ask of S_in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.packing import accumulation_dtype
from kernels.segments import apply_segment, compose_segments
from parallel.exchange import post
from parallel.heads import Run
from parallel.passing import Item, Message, Passing

Map = list[Tensor]  # E and M, or E alone where no state enters


class Chain(NamedTuple):
    """A sequence in several fragments, as a rank that helps to pass its states sees it.

    Attributes:
        rows: in the rank's shard, of each fragment that it holds, by number.
    """

    passing: Passing
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


def enter(
    recurrence: Recurrence,
    chains: Callable[[int], Chains],
    through: Tensor,
    *inputs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The states that enter this rank's fragments that began elsewhere.

    Args:
        chains: of a number of heads.
        through: any tensor that the layer goes on to use. It is returned as it came, and ties
            the exchange of gradients into the backward pass of every rank, also of one whose
            own fragments need no state.
        inputs: of the recurrence, for all tokens of the shard.

    Returns:
        `through`, and the states, one a fragment, in the order of the shard. Gradients of the
        states travel to the ranks before and into their inputs.
    """
    shapes = recurrence.shapes(*inputs)
    return _Enter.apply(recurrence, chains(shapes.E[1]), shapes, through, *inputs)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        chains: Chains,
        shapes: Shapes,
        through: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        own: dict[tuple[int, int], Map] = {}
        for c, chain in enumerate(chains.forward):
            for number, rows in chain.rows.items():
                if number == 0:
                    own[c, number] = [recurrence.final_state(None, *_rows(inputs, rows))]
                elif number < chain.passing.last:
                    own[c, number] = list(recurrence.segment(*_rows(inputs, rows)))[::-1]
        dtype = accumulation_dtype(through.dtype)
        states = passed(chains.forward, own, chains, shapes, through.new_empty(0, dtype=dtype))
        entering = torch.cat([*states.values(), through.new_empty(0, *shapes.E[1:], dtype=dtype)])
        Ms = {key: tensors[1] for key, tensors in own.items() if len(tensors) > 1}
        ctx.recurrence, ctx.chains, ctx.shapes = recurrence, chains, shapes
        ctx.entered, ctx.mapped = list(states), list(Ms)
        ctx.save_for_backward(entering, *Ms.values(), *inputs)
        return through.view_as(through), entering

    @staticmethod
    def backward(ctx: Any, dthrough: Tensor, dentering: Tensor) -> tuple[Any, ...]:
        chains: Chains = ctx.chains
        entering, *rest = ctx.saved_tensors
        Ms = dict(zip(ctx.mapped, rest, strict=False))
        inputs = rest[len(Ms) :]
        last = [chain.passing.last for chain in chains.forward]
        own: dict[tuple[int, int], Map] = {}
        for (c, number), dstate in zip(ctx.entered, dentering.unsqueeze(1), strict=True):
            M = Ms.get((c, number))
            transposed = [] if M is None else [M.mT if M.dim() == 4 else M]
            own[c, last[c] - number] = [dstate, *transposed]
        dleaving = passed(chains.backward, own, chains, ctx.shapes, dentering)

        states = dict(zip(ctx.entered, entering.unsqueeze(1), strict=True))
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        gradients = [torch.zeros_like(x) if i in wanted else None for i, x in enumerate(inputs)]
        for (c, mirrored), dstate in dleaving.items():
            number = last[c] - mirrored
            rows = chains.forward[c].rows[number]
            with torch.enable_grad():
                mine = [
                    None if x is None else x.detach().requires_grad_(i in wanted)
                    for i, x in enumerate(_rows(inputs, rows))
                ]
                final = ctx.recurrence.final_state(states.get((c, number)), *mine)
            leaves: list[Any] = [mine[i] for i in wanted]
            found = torch.autograd.grad(final, leaves, dstate, allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    _rows(gradients, rows)[i].add_(gradient)
        return None, None, None, dthrough, *gradients


def _rows(inputs: Sequence[Any], rows: slice) -> list[Any]:
    """Those rows; a constant of the layer, with one dimension, has none."""
    return [x if x is None or x.dim() == 1 else x[:, rows] for x in inputs]


def passed(
    way: list[Chain],
    own: dict[tuple[int, int], Map],
    chains: Chains,
    shapes: Shapes,
    like: Tensor,
) -> dict[tuple[int, int], Tensor]:
    """The states that enter this rank's fragments, by place of the chain and number, in order.

    Args:
        way: the chains, forward or backward.
        own: maps of this rank's fragments, but of those that are their sequence's last.
        like: for dtype and device.
    """
    heads = (0, shapes.E[1])
    have = {(c, ("fragment", number)): (heads, tensors) for (c, number), tensors in own.items()}
    turns = [chain.passing.turns() for chain in way]

    def turn(number: int) -> dict[tuple[int, Item], Map]:
        messages = [(c, message) for c, turn in enumerate(turns) for message in turn[number]]
        return _exchanged(messages, have, chains, shapes, like)

    maps = turn(0)
    composed: dict[tuple[int, int], tuple[Run, list[Map]]] = {}
    for c, (passing, _) in enumerate(way):
        for r, (run, parts) in enumerate(zip(passing.runs, passing.parts, strict=True)):
            mine = dict(parts).get(chains.rank)
            if mine is not None:
                found = [maps[c, ("fragment", n)] for n in run if n < passing.last]
                composed[c, r] = mine, _composed(found)
                if r < len(passing.runs) - 1:
                    have[c, ("run", r)] = mine, composed[c, r][1][-1]
    maps = turn(1)
    for c, (passing, _) in enumerate(way):
        for parts in passing.upper:
            mine = dict(parts).get(chains.rank)
            if mine is not None:
                found = [maps[c, ("run", r)] for r in range(len(passing.runs) - 1)]
                for r, entry in enumerate(_composed(found), start=1):
                    have[c, ("entry", r)] = mine, entry[:1]
    entries = turn(2)
    for (c, r), (mine, found) in composed.items():
        run = way[c].passing.runs[r]
        states = [E for E, *_ in found]
        if r > 0:
            (S,) = entries[c, ("entry", r)]
            states = [S, *(apply_segment(M, E, S) for E, M in found)]
        for n, state in zip(run if r > 0 else run[1:], states, strict=False):
            have[c, ("state", n)] = mine, [state]
    states_by_item = turn(3)
    return {
        (c, n): states_by_item[c, ("state", n)][0]
        for c, chain in enumerate(way)
        for n in chain.rows
        if n > 0
    }


def _exchanged(
    messages: list[tuple[int, Message]],
    have: dict[tuple[int, Item], tuple[Run, Map]],
    chains: Chains,
    shapes: Shapes,
    like: Tensor,
) -> dict[tuple[int, Item], Map]:
    """What the messages of a turn bring to this rank, the heads of each item put together."""
    sends: dict[int, list[Tensor]] = {}
    receives: dict[int, list[Tensor]] = {}
    got: dict[tuple[int, Item], list[Map]] = {}
    for c, message in messages:
        source, target, item, (a, b), whole = message
        if source == chains.rank:
            (first, _), tensors = have[c, item]
            part = [x[:, a - first : b - first].contiguous() for x in tensors[: 1 + whole]]
            if target != source:
                sends.setdefault(target, []).extend(part)
        elif target == chains.rank:
            every = (shapes.E, shapes.M)[: 1 + whole]
            part = [like.new_empty(1, b - a, *shape[2:]) for shape in every]
            receives.setdefault(source, []).extend(part)
        if target == chains.rank:
            got.setdefault((c, item), []).append(part)
    post(sends, receives, chains.group)()
    return {
        key: [torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)]
        for key, parts in got.items()
    }


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
