"""Full attention across ranks: the strategies behind `parallel.softmax_attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from parallel.exchange import move
from parallel.stream import Shard, View


def across_ranks(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None
) -> Tensor:
    """Causal attention over the shards of all ranks; shapes as in `kernels.softmax_attention`."""
    return _fetch(q, k, v, shard, view, window)


def _fetch(q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None) -> Tensor:
    """Fetch the keys and values before this shard that its first sequence sees.

    Under a window this is all that any rank needs; without one the last rank of a sequence
    comes to hold all of it.
    """
    table = view.halo(view.plan.cu_seqlens[-1] if window is None else window - 1)
    before = move([k[0], v[0]], [table, table], view.rank, view.group)
    k, v = (torch.cat([more, x[0]]).unsqueeze(0) for more, x in zip(before, (k, v), strict=True))
    cu_seqlens_k = F.pad(shard.cu_seqlens[1:] + table.rows, (1, 0))
    o = kernels.softmax_attention(
        q, k, v, cu_seqlens=shard.cu_seqlens, cu_seqlens_k=cu_seqlens_k, window=window
    )
    assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
    return o
