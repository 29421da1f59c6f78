"""Full attention across ranks: the strategies behind `parallel.softmax_attention`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from parallel.exchange import Table, move, parcels, to_device
from parallel.layout import Moves
from parallel.rings import Share, ring_attention, share
from parallel.stream import Shard, View
from parallel.ulysses import ulysses_attention


def across_ranks(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None
) -> Tensor:
    """Causal attention over the shards of all ranks; shapes as in `kernels.softmax_attention`.

    Under a window a token's work is bounded and the stream's layout is even already: a rank
    fetches the window that reaches into its shard, whatever the strategy.
    """
    if window is not None and window < np.diff(view.plan.cu_seqlens).max():
        return _fetch(q, k, v, shard, view, window)
    if view.attention == "allgather":
        return _fetch(q, k, v, shard, view, None)
    attend = ulysses_attention if view.attention == "ulysses" else _planned
    return attend(q[0], k[0], v[0], view).unsqueeze(0)


def _fetch(q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None) -> Tensor:
    """Fetch the keys and values before this shard that its first sequence sees.

    Without a window the last rank of a sequence comes to hold all of it.
    """
    table = view.halo(int(view.plan.cu_seqlens[-1]) if window is None else window - 1)
    before = move([k[0], v[0]], [table, table], view.rank, view.group)
    k, v = (torch.cat([more, x[0]]).unsqueeze(0) for more, x in zip(before, (k, v), strict=True))
    return _whole(
        q, k, v, shard.cu_seqlens, F.pad(shard.cu_seqlens[1:] + table.rows, (1, 0)), window
    )


class _Tables(NamedTuple):
    """From the stream's layout to the plan's, and what this rank does there."""

    to_attention: Table
    to_stream: Table
    shares: list[Share]
    ring_tokens: int
    whole: Tensor  # cu_seqlens of the sequences that lie on this rank alone


def _planned(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Move tokens to where the plan wants them, attend on rings and on single ranks, move back."""
    tables = view.once("planned", lambda: _tables(view))
    moved = move([q, k, v], [tables.to_attention] * 3, view.rank, view.group)
    sizes = [tables.ring_tokens, len(moved[0]) - tables.ring_tokens]
    (ring_q, q), (ring_k, k), (ring_v, v) = (x.split(sizes) for x in moved)
    parts = []
    if tables.shares:  # also where no token of a ring is here: a member hands others' keys on
        parts.append(ring_attention(ring_q, ring_k, ring_v, tables.shares, view.group))
    if sizes[1] or not tables.shares:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        parts.append(_whole(q, k, v, tables.whole, tables.whole, None)[0])
    (o,) = move([torch.cat(parts)], [tables.to_stream], view.rank, view.group)
    return o


def _tables(view: View) -> _Tables:
    plan, rank = view.plan, view.rank
    rings = plan.rings_of(rank)
    rows = plan.whole(rank)
    whole = np.concatenate([[0], np.cumsum((plan.attention.end - plan.attention.start)[rows])])
    return _Tables(
        to_attention=_table(plan.to_attention, rank, int(plan.attention.tokens[rank]), view.device),
        to_stream=_table(plan.to_stream, rank, int(plan.stream.tokens[rank]), view.device),
        shares=[share(ring, member, view.device) for ring, member in rings],
        ring_tokens=sum(int(ring.tokens[member]) for ring, member in rings),
        whole=to_device(whole.astype(np.int32), view.device),
    )


def _table(moves: Moves, rank: int, rows: int, device: torch.device) -> Table:
    gives, takes = moves.sent(rank), moves.received(rank)
    return Table(
        parcels(moves.target[gives], moves.source_offset[gives], moves.tokens[gives], device),
        parcels(moves.source[takes], moves.target_offset[takes], moves.tokens[takes], device),
        rows,
    )


def _whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> Tensor:
    """Attention of sequences whose keys are all here."""
    o = kernels.softmax_attention(
        q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, window=window
    )
    assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
    return o
