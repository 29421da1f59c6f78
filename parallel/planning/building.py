"""The plan of a placing: the layout of attention and its rings, and the stream near them.

owners ── attention layout, rings ──▶ home ── shards ──▶ stream ──▶ moves
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.planning.layout import Array, Layout, Plan, Ring, Topology, moves
from parallel.planning.ordering import even_shards, in_order, near_home, node_shards
from parallel.planning.owners import Owners
from parallel.planning.rings import Members


def build(
    strategy: str,
    lengths: Array,
    owners: Owners | None,
    topology: Topology,
    by_node: bool,
    routing: bool = True,
) -> Plan:
    """The plan of a placing; without one, full attention works in the stream's layout."""
    rings: tuple[Ring, ...] = ()
    if owners is None:
        stream = attention = in_order(lengths, topology.ranks)
    else:
        if not routing:
            owners = owners.flat()
        attention, home, rings = _attention_layout(lengths, owners, topology)
        pinned = np.full(len(lengths), not by_node)
        for ring in rings:
            # A seat over several nodes: each token crosses between nodes, whichever of them has
            # it. Pinned, tokens are spread over all ranks, so that they cross over all NICs.
            if routing and np.ptp(topology.node(ring.ranks), axis=2).any():
                pinned[ring.sequences] = True
        match owners.shards:
            case "even":
                shards = even_shards(home.tokens, 1 / topology.seconds)
            case "node":
                shards = node_shards(home.tokens, topology)
            case "rank":
                shards = home.tokens.copy()
                pinned[:] = True
        while not shards.min() and shards.max() > 1:  # no rank is without any token
            shards[shards.argmin()] += 1
            shards[shards.argmax()] -= 1
        stream = near_home(home, topology, shards, pinned, routing)
    cu_seqlens = np.append(0, np.cumsum(lengths))
    return Plan(
        topology=topology,
        strategy=strategy,
        cu_seqlens=cu_seqlens,
        stream=stream,
        attention=attention,
        rings=rings,
        to_attention=moves(stream, attention, cu_seqlens),
    )


def _attention_layout(
    lengths: Array, owners: Owners, topology: Topology
) -> tuple[Layout, Layout, tuple[Ring, ...]]:
    """The layout of attention, the home of its tokens, and its rings.

    The home is a layout in which every token lies once, with all its heads, on one of the ranks
    that hold it in attention.
    """
    whole = np.flatnonzero(owners.owner >= 0)
    zero, rank = np.zeros_like(whole), owners.owner[whole]
    alone = _Spans(whole, zero, lengths[whole], rank, zero, zero + 1)
    spans, homes, rings = _ring_spans(lengths, owners, topology)
    spans, homes = (
        _Spans(*map(np.concatenate, zip(x, alone, strict=True))) for x in (spans, homes)
    )
    sequence, start, end, rank, piece, slices = spans
    attention = Layout.stack(sequence, start, end, rank, topology.ranks, piece, slices)
    return attention, Layout.stack(*homes[:4], topology.ranks), rings


class _Spans(NamedTuple):
    """Spans in the order in which ranks hold them: columns of `Layout`, int64 (spans,) each."""

    sequence: Array
    start: Array
    end: Array
    rank: Array
    piece: Array
    slices: Array


def _ring_spans(
    lengths: Array, owners: Owners, topology: Topology
) -> tuple[_Spans, _Spans, tuple[Ring, ...]]:
    """The spans of sequences on rings in attention, the same at home, and the rings."""
    on_ring = np.flatnonzero((owners.owner < 0) & (lengths > 0))
    if not len(on_ring):
        none = _Spans(on_ring, on_ring, on_ring, on_ring, on_ring, on_ring)
        return none, none, ()
    used = np.unique(-1 - owners.owner[on_ring]).tolist()
    used.sort(key=lambda g: (-len(owners.grids[g]), -owners.grids[g].size, g))
    grids = [owners.grids[g] for g in used]
    members = Members.of(grids, topology)
    number = np.zeros(len(owners.grids), np.int64)
    number[used] = np.arange(len(used))
    ring = number[-1 - owners.owner[on_ring]]
    order = np.argsort(ring, kind="stable")
    on_ring, ring = on_ring[order], ring[order]
    count = np.bincount(ring)
    first = np.cumsum(count) - count  # (rings,): place of a ring's first sequence in `on_ring`
    slices = members.shapes[:, 2]
    seats = members.size // slices
    chunks = np.where(seats == 1, 1, 2 * seats)  # of one seat, all of a sequence is early
    # Chunks are rounded by a running sum of lengths, so that the odd tokens of many short
    # sequences do not all fall on one rank. (sequences on rings,)
    n = lengths[on_ring]
    upto = np.cumsum(n)
    rounded = (upto - (upto - n)[first][ring]) % chunks[ring]
    # A span for each sequence on each member, of the early chunk, and then of the late one: ring
    # by ring, early ones before late ones. Columns are (spans,) from here on.
    span_counts = np.where(seats == 1, 1, 2) * members.size * count
    of = np.repeat(np.arange(len(grids)), span_counts)
    place = np.arange(len(of)) - (np.cumsum(span_counts) - span_counts)[of]
    place, nth = np.divmod(place, count[of])
    late, place = np.divmod(place, members.size[of])
    seat, piece = np.divmod(place, slices[of])
    member, nth, total, parts = members.first[of] + place, first[of] + nth, chunks[of], slices[of]
    n, lean = n[nth], rounded[nth]
    early_start, early_end = ((x * n + lean) // total for x in (seat, seat + 1))
    late_start, late_end = ((x * n + lean) // total for x in (total - 1 - seat, total - seat))
    start, end = np.where(late, late_start, early_start), np.where(late, late_end, early_end)
    columns = on_ring[nth], members.rank[member], piece, parts
    spans = _Spans(columns[0], start, end, *columns[1:])
    # A seat's tokens of a sequence, early ones before late ones, are divided over its ranks for
    # their home: most ranks then have one fragment of it, and few states pass.
    early = early_end - early_start
    both = early + np.where(total == 1, 0, late_end - late_start)
    before = start - late * early
    home = (np.clip(before + both * x // parts, start, end) for x in (piece, piece + 1))
    homes = _Spans(columns[0], next(home), next(home), *columns[1:])
    # A ring's block lies in a member's buffer after those of the rings before it: (members,).
    held = np.bincount(member, end - start, len(members.rank)).astype(np.int64)
    by_rank = np.argsort(members.rank, kind="stable")
    offset = np.empty_like(held)
    offset[by_rank] = np.cumsum(held[by_rank]) - held[by_rank]
    offset -= offset[by_rank][np.searchsorted(members.rank, members.rank, sorter=by_rank)]
    rings = []
    for i, grid in enumerate(grids):
        mine = slice(first[i], first[i] + count[i])
        bounds = np.arange(2 * seats[i] + 1) * lengths[on_ring[mine], None]
        bounds = (bounds + rounded[mine, None]) // chunks[i]
        if seats[i] == 1:
            bounds[:, 2] = bounds[:, 1]
        block = offset[members.first[i] : members.first[i] + members.size[i]]
        rings.append(Ring(grid, on_ring[mine], bounds, block))
    return spans, homes, tuple(rings)
