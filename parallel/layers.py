"""The layers that mix tokens, over a shard of the stream.

A model calls these instead of the kernels; they fetch what a layer needs from other ranks.
Generation calls them with a shard that no other rank shares (`parallel.shard`): then nothing is
exchanged. Shapes are those of the kernels with B = 1 and T = t, the tokens of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.recurrences import DiagonalScan, LinearAttention, Recurrence
from parallel.planning.heads import Waves
from parallel.planning.passing import TURNS
from parallel.travel import attention
from parallel.travel.chain import begin_states
from parallel.travel.exchange import move
from parallel.travel.view import Shard, View

# A function of (i, n) that computes the i-th of n pieces of work which needs no state.
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
    """`kernels.linear_attention` over the sequences of `shard`; arguments and shapes as there.

    A fragment that continues a sequence starts from the state of the ranks before.

    Args:
        initial_state, output_final_state: only for a shard that no other rank shares.
        meanwhile: called with (i, n) for i < n while states travel; with (0, 1) if none do.

    Raises:
        ValueError: a state is given or wanted, and other ranks share the stream.
        LostRankError: another rank is gone.
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
    op = partial(kernels.linear_attention, scale=scale)
    inputs = (q, k, v, decay, beta)
    return _run(op, LinearAttention(scale), view, shard, meanwhile, inputs), None


def diagonal_scan(
    x: Tensor,
    decay: Tensor,
    shard: Shard,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    meanwhile: Meanwhile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.diagonal_scan` over the sequences of `shard`; the rest as in `linear_attention`."""
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
    return _run(kernels.diagonal_scan, DiagonalScan(), view, shard, meanwhile, (x, decay)), None


def short_convolution(
    x: Tensor,
    weight: Tensor,
    shard: Shard,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.short_convolution` with SiLU over the sequences of `shard`; arguments as there.

    For a fragment that continues a sequence, the W − 1 tokens before it are fetched from the ranks
    that hold them (a halo exchange). States and errors as in `linear_attention`.
    """
    view = _view(shard, initial_state, output_final_state)
    if view is not None:
        reach = weight.shape[1] - 1
        # (1, t, D) -> (continued · (W − 1), D) -> (continued, W − 1, D) -> (N, W − 1, D)
        (halo,) = move([x[0]], [view.halo(reach)], view.rank, view.group)
        others = len(shard.lengths) - view.continued
        initial_state = halo.reshape(view.continued, reach, x.shape[2])
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
    """`kernels.softmax_attention`, causal, over the sequences of `shard`; shapes as there.

    Args:
        window: how many tokens a query sees, its own included; all unless given.
        cu_seqlens_k: bounds of the sequences in k and v, if these also hold earlier tokens (a
            cache). Only for a shard that no other rank shares.

    Raises:
        ValueError: `cu_seqlens_k` is given, and other ranks share the stream.
        LostRankError: another rank is gone.
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
    """`softmax_attention` in waves of heads, for a caller that projects wave by wave too.

        attention = SoftmaxAttention(shard, heads, kv_heads)
        for waves in attention.leaving:
            attention.send(waves, *project(x, waves))
        for waves in attention.arriving:
            y += project_back(attention.receive(waves), waves)

    `leaving` is the first wave, then all others: the first one travels while the others are
    projected. `arriving` is all waves but the last, then the last: it travels while the others are
    projected back. In the backward pass gradients travel likewise. If nothing travels, there is
    one wave with all heads.

    Attributes:
        leaving, arriving: the waves to send and to receive, in this order.
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
        """Send these waves' heads: q (1, t, hq, D), k (1, t, hk, D), v (1, t, hk, Dv)."""
        if self._planned:
            self._planned.send(waves, q[0], k[0], v[0])  # (1, t, h, D) -> (t, h, D)
        else:
            self._kept.append((q, k, v))

    def receive(self, waves: Waves) -> Tensor:
        """These waves' heads of o, (1, t, hq, Dv); each wave once, after all were sent."""
        if self._planned:
            return self._planned.receive(waves).unsqueeze(0)
        return softmax_attention(*self._kept.pop(), self._shard, window=self._window)


def _view(shard: Shard, initial_state: Tensor | None, output_final_state: bool) -> View | None:
    """The plan seen from this rank if any sequence is cut; None if nothing has to be exchanged."""
    if shard.view is None:
        return None
    _refuse_generation(initial_state, output_final_state or None)
    return shard.view if shard.view.crossing else None


def _refuse_generation(*arguments: object) -> None:
    if any(argument is not None for argument in arguments):
        raise ValueError(
            "states and caches are for a shard that no other rank shares: make it by parallel.shard"
        )


def _run(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    recurrence: Recurrence,
    view: View,
    shard: Shard,
    meanwhile: Meanwhile | None,
    inputs: tuple[Tensor | None, ...],
) -> Tensor:
    """`op` over the shard: cut sequences as `travel.chain` says, and whole ones while the first
    states travel."""
    continued, whole, first = zip(*(_in_parts(x, shard) for x in inputs), strict=True)
    transfer = begin_states(recurrence, view.chains, continued, first)
    through = transfer.like
    if shard.parts[1]:
        through, _ = op(*whole, cu_seqlens=shard.cu_seqlens_whole)
    if meanwhile is not None:
        for turn in range(TURNS):
            if turn:
                transfer.advance()
            meanwhile(turn, TURNS)
    through, *ends = transfer.arrive(through)
    outputs = [o for o, t in zip((ends[0], through, ends[1]), shard.parts, strict=True) if t]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _in_parts(x: Tensor | None, shard: Shard) -> Sequence[Tensor | None]:
    """(1, t, …) -> (1, tokens of a part, …) for each of `shard.parts`. A constant (H,) is the same
    for all.

    If one part is all of a rank's tokens, it is x itself: its gradient need not be copied. Not for
    whole sequences: there the backward pass reaches the exchange of gradients through the others.
    """
    if x is None or x.dim() == 1:
        return x, x, x
    alone = [t == shard.tokens for t in shard.parts]
    if alone[0] or alone[2]:
        none = x.detach()[:, :0]
        return [x if all_ else none for all_ in alone]
    return x.split(list(shard.parts), dim=1)
