"""The layers that mix tokens, over a shard of the stream.

A model calls these and never the kernels beneath: what a layer needs from other ranks is
this room's business. A shard of whole sequences needs nothing.
"""

from __future__ import annotations

from torch import Tensor

import kernels
from parallel.stream import Shard


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
) -> tuple[Tensor, Tensor | None]:
    """`kernels.linear_attention` over the sequences of `shard`; shapes are given there."""
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


def short_convolution(
    x: Tensor,
    weight: Tensor,
    shard: Shard,
    *,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.short_convolution` with SiLU over the sequences of `shard`."""
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
    same sequences that came before.
    """
    o = kernels.softmax_attention(
        q, k, v, cu_seqlens=shard.cu_seqlens, cu_seqlens_k=cu_seqlens_k, window=window
    )
    assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
    return o
