"""The layers that mix tokens, over a shard of the stream.

A model calls these and never the kernels beneath: what a layer needs from other ranks is
this room's business. Generation calls them with a shard that no other rank shares
(`parallel.shard`), and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.packing import accumulation_dtype
from kernels.segments import final_state, segment_state
from parallel.planning.heads import Waves
from parallel.planning.passing import TURNS
from parallel.travel import attention
from parallel.travel.chain import Passage, Recurrence, Shapes, depart
from parallel.travel.exchange import move
from parallel.travel.view import Shard, View

# Computes the i-th of n pieces of what is wanted later: of something that no state enters.
Meanwhile = Callable[[int, int], None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    shard: Shard,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    meanwhile: Meanwhile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.linear_attention` over the sequences of `shard`; shapes are given there.

    A sequence that began on other ranks enters with their state. `initial_state` and
    `output_final_state` are for a shard that no other rank shares. `meanwhile` is called while
    states travel, piece by piece, or once if none do.
    """
    view = _view(shard, initial_state, output_final_state)
    if view is None:
        if meanwhile is not None:
            meanwhile(0, 1)
        return kernels.linear_attention(
            q,
            k,
            v,
            decay,
            beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=shard.cu_seqlens,
        )
    passage = depart(_LINEAR_ATTENTION, view.chains, k, v, decay, beta)
    op = partial(kernels.linear_attention, scale=scale)
    return _run(op, view, shard, passage, meanwhile, q, k, v, decay, beta), None


def diagonal_scan(
    x: Tensor,
    decay: Tensor,
    shard: Shard,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    meanwhile: Meanwhile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.diagonal_scan` over the sequences of `shard`, as `linear_attention` here."""
    view = _view(shard, initial_state, output_final_state)
    if view is None:
        if meanwhile is not None:
            meanwhile(0, 1)
        return kernels.diagonal_scan(
            x,
            decay,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=shard.cu_seqlens,
        )
    passage = depart(_DIAGONAL_SCAN, view.chains, x, decay)

    def op(x: Tensor, decay: Tensor, initial_state: Tensor | None = None, **more: Any) -> Any:
        state = None if initial_state is None else initial_state[..., 0, 0]
        return kernels.diagonal_scan(x, decay, initial_state=state, **more)

    return _run(op, view, shard, passage, meanwhile, x, decay), None


def short_convolution(
    x: Tensor,
    weight: Tensor,
    shard: Shard,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.short_convolution` with SiLU over the sequences of `shard`.

    The last W − 1 tokens before a fragment come from the ranks that hold them.
    """
    view = _view(shard, initial_state, output_final_state)
    if view is not None:
        reach = weight.shape[1] - 1
        (halo,) = move([x[0]], [view.halo(reach)], view.rank, view.group)
        others = len(shard.lengths) - view.entering
        initial_state = halo.reshape(view.entering, reach, x.shape[2])
        initial_state = F.pad(initial_state, (0, 0, 0, 0, 0, others))
    return kernels.short_convolution(
        x,
        weight,
        bias,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=shard.cu_seqlens,
    )


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: Shard,
    *,
    window: int | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """`kernels.softmax_attention`, causal, over the sequences of `shard`.

    `cu_seqlens_k` is given where k and v hold more than this shard's tokens: those of the
    same sequences that came before. Such a shard is one that no other rank shares.
    """
    if shard.view is not None:
        _refuse_generation(cu_seqlens_k)
        return attention.across_ranks(q, k, v, shard, shard.view, window)
    o = kernels.softmax_attention(
        q,
        k,
        v,
        cu_seqlens=shard.cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        window=window,
        max_seqlen=max(shard.lengths, default=0),
        max_seqlen_k=None if cu_seqlens_k is None else k.shape[1],
    )
    assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
    return o


class SoftmaxAttention:
    """`softmax_attention` in waves of heads, for a caller that projects tokens wave by wave too.

        attention = SoftmaxAttention(shard, heads, kv_heads)
        for waves in attention.leaving:
            attention.send(waves, *project(x, waves))
        for waves in attention.arriving:
            y += project_back(attention.receive(waves), waves)

    So the first wave to leave travels while the others are projected, and the last to arrive
    while the others are projected back; backward, what comes last and goes first likewise. Where
    nothing travels there is one wave, of all heads.

    Attributes:
        leaving, arriving: the waves to send, and to receive, in this order.
    """

    def __init__(self, shard: Shard, heads: int, kv_heads: int, window: int | None = None) -> None:
        self._shard, self._window, view = shard, window, shard.view
        self._planned = attention.planned(view, heads, kv_heads, window) if view else None
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        every = self._planned.waves if self._planned else 1
        self.leaving, self.arriving = (
            [Waves(a, b, every) for a, b in pairwise(sorted({0, cut, every}))]
            for cut in (1, every - 1)
        )

    def send(self, waves: Waves, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Their heads of q, k and v; shapes as in `kernels.softmax_attention`."""
        if self._planned:
            self._planned.send(waves, q[0], k[0], v[0])
        else:
            self._kept.append((q, k, v))

    def receive(self, waves: Waves) -> Tensor:
        """Their heads of o."""
        if self._planned:
            return self._planned.receive(waves).unsqueeze(0)
        return softmax_attention(*self._kept.pop(), self._shard, window=self._window)


def _view(shard: Shard, initial_state: Tensor | None, output_final_state: bool) -> View | None:
    """The shard among those of other ranks, if any sequence lies on more than one."""
    if shard.view is None:
        return None
    _refuse_generation(initial_state, output_final_state or None)
    return shard.view if shard.view.crossing else None


def _refuse_generation(*arguments: object) -> None:
    if any(argument is not None for argument in arguments):
        raise ValueError("states and caches go with a shard made by parallel.shard alone")


def _run(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    view: View,
    shard: Shard,
    passage: Passage,
    meanwhile: Meanwhile | None,
    *inputs: Tensor | None,
) -> Tensor:
    """`op` over the shard: what begins here while states travel, then what they enter.

    Two calls, for zeros for a state a fragment would be more memory than the tokens of many
    short ones.
    """
    begun = sum(shard.lengths[: view.entering])
    sizes = [begun, shard.tokens - begun]
    heads, tails = zip(
        *(
            (x, x) if x is None or x.dim() == 1 else x.split(sizes, dim=1)  # a constant or rows
            for x in inputs
        ),
        strict=True,
    )
    through = passage.like
    if view.entering < len(shard.lengths):
        through, _ = op(*tails, cu_seqlens=shard.later)
    if meanwhile is not None:
        for turn in range(TURNS):
            if turn:
                passage.advance()
            meanwhile(turn, TURNS)
    o, states = passage.arrive(through)
    if not view.entering:
        return o
    first, _ = op(*heads, initial_state=states, cu_seqlens=shard.begun)
    return torch.cat([first, o], dim=1) if view.entering < len(shard.lengths) else first


def _shapes(k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> Shapes:
    Dk, (Hv, Dv) = k.shape[3], v.shape[2:]
    per_channel = decay is not None and decay.dim() == 4
    M = (1, Hv, Dk, Dk) if beta is not None else (1, Hv, Dk) if per_channel else (1, Hv)
    return Shapes(torch.Size(M), torch.Size((1, Hv, Dk, Dv)))


def _final_state(
    entering: Tensor | None, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None
) -> Tensor:
    if entering is None:
        shape = _shapes(k, v, decay, beta).E
        entering = torch.zeros(shape, dtype=accumulation_dtype(k.dtype), device=k.device)
    return final_state(k, v, decay, beta, entering)


# Of k, v, decay and beta.
_LINEAR_ATTENTION = Recurrence(_shapes, segment_state, _final_state)


def _scan_shapes(x: Tensor, decay: Tensor) -> Shapes:
    return Shapes(torch.Size((1, x.shape[2])), torch.Size((1, x.shape[2], 1, 1)))


def _scan_segment(x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    M = decay.sum(1, dtype=accumulation_dtype(x.dtype)).exp()
    return M, _scan_final_state(None, x, decay)


def _scan_final_state(entering: Tensor | None, x: Tensor, decay: Tensor) -> Tensor:
    state = None if entering is None else entering[..., 0, 0]
    _, final = kernels.diagonal_scan(x, decay, initial_state=state, output_final_state=True)
    assert final is not None
    return final[..., None, None]


# Of x and decay; each channel is a head with a state of one number.
_DIAGONAL_SCAN = Recurrence(_scan_shapes, _scan_segment, _scan_final_state)
