"""Full attention across ranks: the strategies behind `parallel.softmax_attention`.

    balanced, ring   move q, k and v to the plan's attention layout, attend there on rings and to
                     whole sequences, move o back (`PlannedAttention`), wave by wave
    allgather        fetch all earlier keys and values of this shard's sequences (`_fetch`)
    ulysses          divide heads over all ranks (`parallel.travel.ulysses`)
    any, in a window fetch the keys and values that the window reaches (`_fetch`)

Where the plan splits heads, tables are of rows (token, head) instead of rows of tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from parallel.planning.heads import Waves, split
from parallel.planning.layout import Moves
from parallel.travel.exchange import (
    PeerRows,
    Table,
    Transfer,
    begin_move,
    move,
    peer_rows,
    to_device,
)
from parallel.travel.rings import Share, ring_attention, share
from parallel.travel.ulysses import ulysses_attention
from parallel.travel.view import Shard, View


def across_ranks(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None
) -> Tensor:
    """Causal attention over the shards of all ranks: q (1, t, Hq, D), k, v -> o (1, t, Hq, Dv).

    With a window the work of a token is bounded, so the stream's layout is even enough: whatever
    the strategy, a rank fetches the keys before its fragments that their windows reach.
    """
    moved = planned(view, q.shape[2], k.shape[2], window)
    if moved is not None:
        every = Waves(0, moved.waves, moved.waves)
        moved.send(every, q[0], k[0], v[0])
        return moved.receive(every).unsqueeze(0)
    if window is not None or view.attention == "allgather":
        return _fetch(q, k, v, shard, view, window)
    return ulysses_attention(q[0], k[0], v[0], view).unsqueeze(0)


def planned(view: View, heads: int, kv_heads: int, window: int | None) -> PlannedAttention | None:
    """Attention in the plan's own layout, or None if the strategy or a window needs none."""
    stay = window is not None or view.attention in ("allgather", "ulysses")
    return None if stay else PlannedAttention(view, heads, kv_heads)


def _fetch(q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None) -> Tensor:
    """Attention in the stream, after fetching the keys and values that this shard's queries see.

    Without a window the rank with a sequence's last tokens fetches all of it.
    """
    reach = int(view.plan.cu_seqlens[-1]) if window is None else window - 1
    table, cu_seqlens_k, longest = view.with_preceding(reach)
    # (t, Hk, D) -> (1, r, Hk, D): each fragment with the keys before it
    k, v = (x.unsqueeze(0) for x in move([k[0], v[0]], [table, table], view.rank, view.group))
    o = kernels.softmax_attention(
        q,
        k,
        v,
        cu_seqlens=shard.cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        window=window,
        max_seqlen=max(shard.lengths),
        max_seqlen_k=longest,
    )
    assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
    return o


class _Block(NamedTuple):
    """Consecutive rows of a rank's attention buffer: those of one ring, or of whole sequences.

    Attributes:
        heads, kv_heads: how many query heads and key heads of each token the rank has.
        share: its rounds in the ring; None for whole sequences, the last block.
    """

    tokens: int
    heads: int
    kv_heads: int
    share: Share | None


class _Tables(NamedTuple):
    """One wave's way from the stream's layout to the attention layout, and this rank's work there.

    Rows of the tables are *units*: (token, head) if the plan splits heads, else tokens.
    """

    q: Table
    kv: Table
    o: Table
    blocks: list[_Block]
    whole: Tensor  # cu_seqlens of the sequences that this rank holds whole
    max_seqlen: int  # tokens of the longest of them


class PlannedAttention:
    """Attention in the plan's attention layout, one wave of heads after the other.

    `send` moves q, k and v of some waves there; `receive` attends and moves o back. While one wave
    is computed, the next wave's q, k and v and the last wave's o travel.
    """

    def __init__(self, view: View, heads: int, kv_heads: int) -> None:
        self.view = view
        # The plan's waves divide the heads of the layer it was made for; others may have fewer.
        self.waves = math.gcd(view.plan.waves, heads, kv_heads)
        self._heads, kv_heads = heads // self.waves, kv_heads // self.waves
        key = ("planned", self._heads, kv_heads, self.waves)
        self._tables = view.cached(key, lambda: _by_wave(view, *key[1:]))
        self._coming: deque[Transfer] = deque()
        self._going: list[Transfer] = []

    def send(self, waves: Waves, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Send the heads of some waves: q, k and v (t, heads of these waves, D or Dv).

        All waves must be sent, in order.
        """
        every = self._tables[waves.begin : waves.end]
        # (t, heads, D) -> one (t, heads a wave, D) for each wave
        parts = zip(*(x.chunk(len(every), dim=1) for x in (q, k, v)), strict=True)
        for each, tables in zip(parts, every, strict=True):
            # (t, heads, D) -> (t · heads, D) if the plan splits heads
            units = [x.flatten(0, 1) if self.view.plan.sliced else x for x in each]
            which = [tables.q, tables.kv, tables.kv]
            self._coming.append(begin_move(units, which, self.view.rank, self.view.group))

    def receive(self, waves: Waves) -> Tensor:
        """o (t, heads of these waves, Dv). Each wave once, after all were sent."""
        view = self.view
        while self._coming:
            tables = self._tables[len(self._going)]
            o = _attend(self._coming.popleft().arrive(), tables, view)
            self._going.append(begin_move([o], [tables.o], view.rank, view.group))
        parts = [o for wave in self._going[waves.begin : waves.end] for o in wave.arrive()]
        if view.plan.sliced:
            tokens = int(view.plan.stream.tokens[view.rank])
            parts = [o.unflatten(0, (tokens, self._heads)) for o in parts]  # (t · h, Dv) each
        return torch.cat(parts, dim=1)


def _attend(moved: list[Tensor], tables: _Tables, view: View) -> Tensor:
    """One wave's attention on this rank: units of q, k and v -> units of o, in buffer order."""
    by_head = view.plan.sliced
    *shared, alone = zip(
        _blocks(moved[0], tables.blocks, by_head, "heads"),
        _blocks(moved[1], tables.blocks, by_head, "kv_heads"),
        _blocks(moved[2], tables.blocks, by_head, "kv_heads"),
        strict=True,
    )
    parts = []
    if shared:  # even a member without a token of its own must pass the others' keys on
        shares = [block.share for block in tables.blocks if block.share is not None]
        parts += ring_attention(shares, shared, view.group)
    if tables.blocks[-1].tokens or not shared:
        q, k, v = (x.unsqueeze(0) for x in alone)  # (n, H, D) -> (1, n, H, D)
        o = kernels.softmax_attention(
            q, k, v, cu_seqlens=tables.whole, max_seqlen=tables.max_seqlen
        )
        assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
        parts.append(o[0])
    # (n, h, Dv) -> (n · h, Dv) if the plan splits heads
    return torch.cat([o.flatten(0, 1) if by_head else o for o in parts])


def _blocks(x: Tensor, blocks: list[_Block], by_head: bool, which: str) -> Iterator[Tensor]:
    """The rank's buffer of units, (units, D) or (tokens, H, D), as its blocks (tokens, H, D)."""
    sizes = [(block.tokens, getattr(block, which)) for block in blocks]
    parts = x.split([tokens * heads if by_head else tokens for tokens, heads in sizes])
    for part, size in zip(parts, sizes, strict=True):
        yield part.unflatten(0, size) if by_head else part


def _by_wave(view: View, heads: int, kv_heads: int, waves: int) -> list[_Tables]:
    """The tables of each wave. If slices are even, one serves all waves: `split` need not rotate
    them."""
    pieces = {ring.slices for ring in view.plan.rings}
    if any(heads % n or (kv_heads % n and n % kv_heads) for n in pieces):
        return [_tables(view, heads, kv_heads, wave) for wave in range(waves)]
    return [_tables(view, heads, kv_heads, 0)] * waves


def _tables(view: View, heads: int, kv_heads: int, wave: int) -> _Tables:
    plan, rank, device = view.plan, view.rank, view.device
    rows = plan.whole(rank)
    lengths = (plan.attention.end - plan.attention.start)[rows]
    blocks = []
    for ring, member in plan.rings_of(rank):
        seat, piece = divmod(member, ring.slices)
        (a, b), (c, d) = split(heads, kv_heads, ring.slices, wave)[piece]
        tokens = int(ring.tokens[seat])
        blocks.append(_Block(tokens, b - a, d - c, share(ring, member, device)))
    blocks.append(_Block(int(lengths.sum()), heads, kv_heads, None))
    unit = (heads, kv_heads) if plan.sliced else (1, 1)
    q, kv = (_table(view, blocks, unit, wave, which) for which in (0, 1))
    return _Tables(
        q=q,
        kv=kv,
        o=q.reversed(int(plan.stream.tokens[rank]) * unit[0]),
        blocks=blocks,
        whole=to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device),
        max_seqlen=int(lengths.max(initial=0)),
    )


def _table(
    view: View, blocks: list[_Block], heads: tuple[int, int], wave: int, which: int
) -> Table:
    """The table that moves units from the stream into this rank's blocks.

    Args:
        heads: units of one token in the stream: of q, and of k and v.
        which: 0 for the table of q, 1 for that of k and v.
    """
    moves, rank = view.plan.to_attention, view.rank
    tokens = np.array([block.tokens for block in blocks])
    held = np.array([(block.heads, block.kv_heads)[which] for block in blocks])
    if not view.plan.sliced:
        held[:] = 1
    begin, first_unit = (np.cumsum(x) - x for x in (tokens, tokens * held))  # (blocks,) each

    gives, takes = moves.sent(rank), moves.received(rank)
    first, count = _heads(moves, gives, heads, wave, which)
    left = moves.source_offset[gives] * heads[which] + first
    offset = moves.target_offset[takes]
    block = np.searchsorted(begin, offset, side="right") - 1
    arrived = first_unit[block] + (offset - begin[block]) * held[block]
    return Table(
        _peer_rows(
            moves.target[gives], left, heads[which], count, moves.tokens[gives], view.device
        ),
        _peer_rows(
            moves.source[takes], arrived, held[block], held[block], moves.tokens[takes], view.device
        ),
        int((tokens * held).sum()),
    )


def _heads(
    moves: Moves, rows: np.ndarray, heads: tuple[int, int], wave: int, which: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `moves`, the first of its heads and their number: int64 (rows,) each."""
    first, count = np.zeros_like(rows), np.full_like(rows, heads[which])
    for slices in np.unique(moves.slices[rows]):
        runs = np.array([piece[which] for piece in split(*heads, int(slices), wave)])
        these = moves.slices[rows] == slices
        first[these], end = runs[moves.piece[rows][these]].T
        count[these] = end - first[these]
    return first, count


def _peer_rows(
    peer: np.ndarray,
    start: np.ndarray,
    stride: np.ndarray | int,
    count: np.ndarray,
    tokens: np.ndarray,
    device: torch.device,
) -> PeerRows:
    """The table of runs of `count` units, one for each of `tokens` tokens, `stride` apart.

    Args:
        peer, start, count, tokens: (moves,) int; a stride equal to its count makes one long run.
    """
    apart = np.asarray(stride) != count
    pieces = np.where(apart, tokens, 1)
    row = np.repeat(np.arange(len(peer)), pieces)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = start[row] + nth * np.broadcast_to(stride, count.shape)[row]
    return peer_rows(peer[row], begin, np.where(apart, count, count * tokens)[row], device)
