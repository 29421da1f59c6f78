"""Softmax attention by heads: every rank takes some heads of the whole stream.

With more ranks than key heads, ranks share a key head and split its query heads; with more
than query heads, they split the stream's queries too, and each holds the keys up to its own.

Source: DeepSpeed Ulysses, Jacobs et al. 2023 (arXiv 2309.14509).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

import kernels
from parallel.planning.heads import Run, shares
from parallel.travel.exchange import Table, move, parcels, to_device
from parallel.travel.view import View


class Part(NamedTuple):
    """What one rank computes: the heads as [first, end), and so the queries and keys by token."""

    heads: Run
    kv_heads: Run
    queries: Run
    keys: Run


class Tables(NamedTuple):
    """Of units, a unit being one head of one token: to the ranks that compute, and back."""

    q: Table
    kv: Table
    o: Table
    part: Part
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    max_seqlen: int
    max_seqlen_k: int


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Causal attention; q (t, Hq, D), k and v (t, Hk, ·) of this rank's shard, o (t, Hq, Dv)."""
    (t, heads, _), kv_heads = q.shape, k.shape[1]
    tables = view.once(("ulysses", heads, kv_heads), lambda: _tables(view, heads, kv_heads))
    moved = move(
        [x.flatten(0, 1) for x in (q, k, v)],
        [tables.q, tables.kv, tables.kv],
        view.rank,
        view.group,
    )
    widths = [b - a for a, b in (tables.part.heads, tables.part.kv_heads, tables.part.kv_heads)]
    q, k, v = (x.unflatten(0, (-1, n)).unsqueeze(0) for x, n in zip(moved, widths, strict=True))
    o = kernels.softmax_attention(
        q,
        k,
        v,
        cu_seqlens=tables.cu_seqlens,
        cu_seqlens_k=tables.cu_seqlens_k,
        max_seqlen=tables.max_seqlen,
        max_seqlen_k=tables.max_seqlen_k,
    )
    assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
    (o,) = move([o[0].flatten(0, 1)], [tables.o], view.rank, view.group)
    return o.unflatten(0, (t, heads))


def parts(cu_seqlens: np.ndarray, ranks: int, heads: int, kv_heads: int) -> list[Part]:
    """What each rank computes of a stream."""
    total = int(cu_seqlens[-1])
    found = []
    for group, members in shares(kv_heads, ranks):
        if len(members) == 1:
            ratio = heads // kv_heads
            a, b = group
            found.append(Part((a * ratio, b * ratio), group, (0, total), (0, total)))
            continue
        first = group[0] * (heads // kv_heads)
        for (a, b), sharers in shares(heads // kv_heads, len(members)):
            for i in range(len(sharers)):
                begin, end = (total * j // len(sharers) for j in (i, i + 1))
                sequence = np.searchsorted(cu_seqlens, begin, side="right") - 1
                keys = int(cu_seqlens[sequence]), end
                found.append(Part((first + a, first + b), group, (begin, end), keys))
    return found


def _tables(view: View, heads: int, kv_heads: int) -> Tables:
    cu_seqlens, bounds = view.plan.cu_seqlens, _bounds(view)
    every = parts(cu_seqlens, len(bounds) - 1, heads, kv_heads)
    mine = every[view.rank]
    q = _table(view, heads, [(part.queries, part.heads) for part in every])
    kv = _table(view, kv_heads, [(part.keys, part.kv_heads) for part in every])
    clipped = [np.clip(cu_seqlens, *tokens) - tokens[0] for tokens in (mine.queries, mine.keys)]
    bounds_q, bounds_k = (to_device(x.astype(np.int32), view.device) for x in clipped)
    own = int(bounds[view.rank + 1] - bounds[view.rank])
    return Tables(
        q, kv, q.reversed(own * heads), mine, bounds_q, bounds_k, *(_longest(x) for x in clipped)
    )


def _bounds(view: View) -> np.ndarray:
    """(ranks + 1,): rank r holds the tokens [bounds[r], bounds[r + 1]) of the batch."""
    return np.append(0, np.cumsum(view.plan.stream.tokens))


def _longest(cu_seqlens: np.ndarray) -> int:
    return int(np.diff(cu_seqlens).max(initial=0))


def _table(view: View, heads: int, wanted: list[tuple[Run, Run]]) -> Table:
    """From shards with all heads to the (tokens, heads) that each rank wants."""
    bounds, rank = _bounds(view), view.rank
    begin, end = int(bounds[rank]), int(bounds[rank + 1])
    gives = []
    for peer, ((first, last), (a, b)) in enumerate(wanted):
        tokens = np.arange(max(begin, first), min(end, last))
        runs = np.full_like(tokens, peer), (tokens - begin) * heads + a, np.full_like(tokens, b - a)
        gives.append(np.stack(runs))
    (first, last), (a, b) = wanted[rank]
    edges = np.clip(bounds, first, last) * (b - a)
    peers, starts, counts = np.concatenate(gives, axis=1)
    return Table(
        parcels(peers, starts, counts, view.device),
        parcels(np.arange(len(wanted)), edges[:-1] - edges[0], np.diff(edges), view.device),
        int(edges[-1] - edges[0]),
    )
