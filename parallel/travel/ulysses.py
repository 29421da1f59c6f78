"""Softmax attention by heads: two all-to-alls, and between them each rank has some heads of all T
tokens of the stream.

    q (t, Hq, D)   -> (T, Hq / P, D)     all-to-all: tokens gathered, heads scattered
    o (T, Hq / P, Dv) -> (t, Hq, Dv)     and back

With more ranks than key heads, several ranks copy one key head and divide its query heads. With
more ranks than query heads, they divide the queries of the stream too, and each of them gets the
keys from the start of its first query's sequence to its last query.

Source: DeepSpeed Ulysses, Jacobs et al. 2023 (arXiv 2309.14509).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

import kernels
from parallel.planning.heads import Run, divide
from parallel.travel.exchange import Table, move, peer_rows, to_device
from parallel.travel.view import View


class Part(NamedTuple):
    """What one rank computes, as [first, end): query heads, key heads; tokens of q, tokens of k."""

    heads: Run
    kv_heads: Run
    queries: Run
    keys: Run


class Tables(NamedTuple):
    """Tables of rows (token, head): q, k and v to the ranks that compute, o back.

    `cu_seqlens`, `cu_seqlens_k` and the longest lengths are of this rank's queries and keys.
    """

    q: Table
    kv: Table
    o: Table
    part: Part
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    max_seqlen: int
    max_seqlen_k: int


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    """Causal attention over all shards; the stream has the batch's order.

    Args:
        q, k, v: (t, Hq, D), (t, Hk, D), (t, Hk, Dv), this rank's shard.

    Returns:
        o (t, Hq, Dv).
    """
    (t, heads, _), kv_heads = q.shape, k.shape[1]
    tables = view.cached(("ulysses", heads, kv_heads), lambda: _tables(view, heads, kv_heads))
    moved = move(
        [x.flatten(0, 1) for x in (q, k, v)],  # (t, H, D) -> (t · H, D)
        [tables.q, tables.kv, tables.kv],
        view.rank,
        view.group,
    )
    widths = [b - a for a, b in (tables.part.heads, tables.part.kv_heads, tables.part.kv_heads)]
    # (tokens · n, D) -> (1, tokens, n, D) with this rank's n heads
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
    # (1, tokens, n, Dv) -> (tokens · n, Dv) -> (t · Hq, Dv) -> (t, Hq, Dv)
    (o,) = move([o[0].flatten(0, 1)], [tables.o], view.rank, view.group)
    return o.unflatten(0, (t, heads))


def parts(cu_seqlens: np.ndarray, ranks: int, heads: int, kv_heads: int) -> list[Part]:
    """What each rank computes, for a stream in the batch's order.

    Args:
        cu_seqlens: (N + 1,) int.
    """
    total = int(cu_seqlens[-1])
    found = []
    for group, members in divide(kv_heads, ranks):
        if len(members) == 1:
            ratio = heads // kv_heads
            a, b = group
            found.append(Part((a * ratio, b * ratio), group, (0, total), (0, total)))
            continue
        first = group[0] * (heads // kv_heads)
        for (a, b), sharers in divide(heads // kv_heads, len(members)):
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
    """int64 (ranks + 1,): rank r holds tokens [bounds[r], bounds[r + 1]) of the batch."""
    return np.append(0, np.cumsum(view.plan.stream.tokens))


def _longest(cu_seqlens: np.ndarray) -> int:
    return int(np.diff(cu_seqlens).max(initial=0))


def _table(view: View, heads: int, wanted: list[tuple[Run, Run]]) -> Table:
    """Table from shards, with all heads, to the tokens and heads that each rank computes.

    Args:
        wanted: for each rank, tokens and heads as [first, end).
    """
    bounds, rank = _bounds(view), view.rank
    begin, end = int(bounds[rank]), int(bounds[rank + 1])
    gives = []
    for peer, ((first, last), (a, b)) in enumerate(wanted):
        tokens = np.arange(max(begin, first), min(end, last))
        runs = np.full_like(tokens, peer), (tokens - begin) * heads + a, np.full_like(tokens, b - a)
        gives.append(np.stack(runs))  # (3, tokens): peer, first row, rows
    (first, last), (a, b) = wanted[rank]
    edges = np.clip(bounds, first, last) * (b - a)
    peers, starts, counts = np.concatenate(gives, axis=1)
    return Table(
        peer_rows(peers, starts, counts, view.device),
        peer_rows(np.arange(len(wanted)), edges[:-1] - edges[0], np.diff(edges), view.device),
        int(edges[-1] - edges[0]),
    )
