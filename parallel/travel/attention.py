"""Full attention across ranks: the strategies behind `parallel.softmax_attention`."""

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
from parallel.travel.exchange import Journey, Parcels, Table, depart, move, parcels, to_device
from parallel.travel.rings import Share, ring_attention, share
from parallel.travel.ulysses import ulysses_attention
from parallel.travel.view import Shard, View


def across_ranks(
    q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None
) -> Tensor:
    """Causal attention over the shards of all ranks; shapes as in `kernels.softmax_attention`.

    Under a window a token's work is bounded and the stream's layout is even already: a rank
    fetches the windows that reach into its shard, whatever the strategy.
    """
    moved = planned(view, q.shape[2], k.shape[2], window)
    if moved is not None:
        every = Waves(0, moved.waves, moved.waves)
        moved.send(every, q[0], k[0], v[0])
        return moved.receive(every).unsqueeze(0)
    if window is not None or view.attention == "allgather":
        return _fetch(q, k, v, shard, view, window)
    return ulysses_attention(q[0], k[0], v[0], view).unsqueeze(0)


def planned(view: View, heads: int, kv_heads: int, window: int | None) -> Planned | None:
    """None where tokens stay in the stream's layout, or leave it by heads alone."""
    stay = window is not None or view.attention in ("allgather", "ulysses")
    return None if stay else Planned(view, heads, kv_heads)


def _fetch(q: Tensor, k: Tensor, v: Tensor, shard: Shard, view: View, window: int | None) -> Tensor:
    """Fetch the keys and values before this shard's fragments that these see.

    Without a window the last rank of a sequence comes to hold all of it.
    """
    reach = int(view.plan.cu_seqlens[-1]) if window is None else window - 1
    table, cu_seqlens_k, longest = view.reaching(reach)
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
    """A run of a rank's buffer: its tokens in a ring, or, last, those of whole sequences.

    Attributes:
        heads, kv_heads: that the rank has of each token.
        share: its part in the ring.
    """

    tokens: int
    heads: int
    kv_heads: int
    share: Share | None


class _Tables(NamedTuple):
    """From the stream's layout to the plan's, and what this rank does there.

    Tables are of units: one head of one token where the plan splits heads, else a token.
    """

    q: Table
    kv: Table
    o: Table
    blocks: list[_Block]
    whole: Tensor  # cu_seqlens of the sequences that lie on this rank alone
    max_seqlen: int  # of these


class Planned:
    """Tokens go where the plan wants them, are attended to there, on rings and on single ranks,
    and o comes back: one wave of heads after the other, while the next one's tokens come and the
    last one's go.
    """

    def __init__(self, view: View, heads: int, kv_heads: int) -> None:
        self.view = view
        # A plan's waves are those of one kind of layer; another may have fewer heads.
        self.waves = math.gcd(view.plan.waves, heads, kv_heads)
        self._heads, kv_heads = heads // self.waves, kv_heads // self.waves
        key = ("planned", self._heads, kv_heads, self.waves)
        self._tables = view.once(key, lambda: _by_wave(view, *key[1:]))
        self._coming: deque[Journey] = deque()
        self._going: list[Journey] = []

    def send(self, waves: Waves, q: Tensor, k: Tensor, v: Tensor) -> None:
        """The heads of some waves, (t, heads, channels) each; all are sent, in order."""
        every = self._tables[waves.begin : waves.end]
        parts = zip(*(x.chunk(len(every), dim=1) for x in (q, k, v)), strict=True)
        for each, tables in zip(parts, every, strict=True):
            units = [x.flatten(0, 1) if self.view.plan.sliced else x for x in each]
            which = [tables.q, tables.kv, tables.kv]
            self._coming.append(depart(units, which, self.view.rank, self.view.group))

    def receive(self, waves: Waves) -> Tensor:
        """o (t, heads, channels) of some waves, each once and after all were sent."""
        view = self.view
        while self._coming:
            tables = self._tables[len(self._going)]
            o = _attend(self._coming.popleft().arrive(), tables, view)
            self._going.append(depart([o], [tables.o], view.rank, view.group))
        parts = [o for wave in self._going[waves.begin : waves.end] for o in wave.arrive()]
        if view.plan.sliced:
            tokens = int(view.plan.stream.tokens[view.rank])
            parts = [o.unflatten(0, (tokens, self._heads)) for o in parts]
        return torch.cat(parts, dim=1)


def _attend(moved: list[Tensor], tables: _Tables, view: View) -> Tensor:
    """Units of o from those of q, k and v, all in the buffer's order."""
    by_head = view.plan.sliced
    *shared, alone = zip(
        _blocks(moved[0], tables.blocks, by_head, "heads"),
        _blocks(moved[1], tables.blocks, by_head, "kv_heads"),
        _blocks(moved[2], tables.blocks, by_head, "kv_heads"),
        strict=True,
    )
    parts = []
    if shared:  # also where no token of a ring is here: a member hands others' keys on
        shares = [block.share for block in tables.blocks if block.share is not None]
        parts += ring_attention(shares, shared, view.group)
    if tables.blocks[-1].tokens or not shared:
        q, k, v = (x.unsqueeze(0) for x in alone)
        o = kernels.softmax_attention(
            q, k, v, cu_seqlens=tables.whole, max_seqlen=tables.max_seqlen
        )
        assert isinstance(o, Tensor)  # a pair only when the log-sum-exp is asked for
        parts.append(o[0])
    return torch.cat([o.flatten(0, 1) if by_head else o for o in parts])


def _blocks(x: Tensor, blocks: list[_Block], by_head: bool, which: str) -> Iterator[Tensor]:
    """The rank's buffer, block by block: (tokens, heads, channels) each."""
    sizes = [(block.tokens, getattr(block, which)) for block in blocks]
    parts = x.split([tokens * heads if by_head else tokens for tokens, heads in sizes])
    for part, size in zip(parts, sizes, strict=True):
        yield part.unflatten(0, size) if by_head else part


def _by_wave(view: View, heads: int, kv_heads: int, waves: int) -> list[_Tables]:
    """The tables of each wave; uneven slices have other heads in every one (`split`)."""
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
    """The units of q (`which` is 0) or of k and v (1) from the stream into this rank's blocks.

    Args:
        heads: units of a token in the stream, of q and of k and v.
    """
    moves, rank = view.plan.to_attention, view.rank
    tokens = np.array([block.tokens for block in blocks])
    held = np.array([(block.heads, block.kv_heads)[which] for block in blocks])
    if not view.plan.sliced:
        held[:] = 1
    begin, first_unit = (np.cumsum(x) - x for x in (tokens, tokens * held))

    gives, takes = moves.sent(rank), moves.received(rank)
    first, count = _heads(moves, gives, heads, wave, which)
    left = moves.source_offset[gives] * heads[which] + first
    offset = moves.target_offset[takes]
    block = np.searchsorted(begin, offset, side="right") - 1
    arrived = first_unit[block] + (offset - begin[block]) * held[block]
    return Table(
        _parcels(moves.target[gives], left, heads[which], count, moves.tokens[gives], view.device),
        _parcels(
            moves.source[takes], arrived, held[block], held[block], moves.tokens[takes], view.device
        ),
        int((tokens * held).sum()),
    )


def _heads(
    moves: Moves, rows: np.ndarray, heads: tuple[int, int], wave: int, which: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first of the heads that go with each row of moves, and how many go."""
    first, count = np.zeros_like(rows), np.full_like(rows, heads[which])
    for slices in np.unique(moves.slices[rows]):
        runs = np.array([piece[which] for piece in split(*heads, int(slices), wave)])
        these = moves.slices[rows] == slices
        first[these], end = runs[moves.piece[rows][these]].T
        count[these] = end - first[these]
    return first, count


def _parcels(
    peer: np.ndarray,
    start: np.ndarray,
    stride: np.ndarray | int,
    count: np.ndarray,
    tokens: np.ndarray,
    device: torch.device,
) -> Parcels:
    """Parcels of `count` units from `start`, of as many again a stride further on, and so on."""
    apart = np.asarray(stride) != count
    pieces = np.where(apart, tokens, 1)
    row = np.repeat(np.arange(len(peer)), pieces)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = start[row] + nth * np.broadcast_to(stride, count.shape)[row]
    return parcels(peer[row], begin, np.where(apart, count, count * tokens)[row], device)
