"""The plan of a batch: from its lengths alone, where every token lies in every kind of layer.

    lengths ── placing ──▶ owners ──▶ attention layout, rings ──▶ stream, near home ──▶ moves

A pure function of its arguments: every rank computes the same plan, once a batch, on the
CPU. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from parallel.planning.clusters import MEMORY_SLACK
from parallel.planning.cost import price
from parallel.planning.costs import BACKWARD, Costs
from parallel.planning.layout import Array, Layout, Moves, Plan, Ring, Round, Topology, moves
from parallel.planning.ordering import even_shards, in_order, near_home, node_shards, shard_bounds
from parallel.planning.owners import Owners, everywhere, room, undivided, where_they_lie
from parallel.planning.placing import Limits, balanced
from parallel.planning.prices import Prices
from parallel.planning.states import price_states

__all__ = ["Costs", "Layout", "Moves", "Plan", "Ring", "Round", "Strategy", "Topology", "plan"]

Strategy = Literal["balanced", "ring", "even", "allgather"]

# Placings that are tried after the one where nothing moves, the likeliest first. The fuller a
# node may be, the fewer ranks share a long sequence; where a node or a rank may hold more than its
# share of tokens, work is more even and more moves; where heads are split less, more of the moves
# are hidden; of rows of a node a ring may have more nearly as many as it needs; where all work is
# levelled at once, less moves to make attention even. Chosen one after the other for what each
# adds on 400 batches, of these lengths, others, and few long sequences, on 16 to 256 GPUs. The
# cheapest is taken, or the first that is good enough.
_LIMITS = (
    Limits(level=1.2, tokens=1.0, slices=0.5),
    Limits(level=1.05, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.02, tokens=1.05, slices=0.25, slack=0.3),
    Limits(level=1.2, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.1, tokens=1.05, slices=0.5, slack=0.6, rows=2),
    Limits(level=1.1, tokens=1.15, slices=0.5, slack=0.6),
    Limits(level=1.02, tokens=1.0, slices=0.5, rows=4),
    Limits(level=1.1, tokens=1.05, slices=0.5, uneven=True),
    Limits(level=1.0, tokens=1.0, slices=0.5),
    Limits(level=1.02, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.4, tokens=1.4, slices=0.5, slack=0.6, rows=2),
    Limits(level=1.05, tokens=1.4, slices=0.25, slack=0.6),
    Limits(level=1.02, tokens=1.15, slices=0.25),
    Limits(level=1.0, tokens=1.15, slices=0.5, rows=2, uneven=True),
    Limits(level=1.4, tokens=1.15),
    Limits(level=1.0, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.1, tokens=1.0),
    Limits(level=1.2, tokens=1.15, slices=0.5, rows=2),
    Limits(level=1.0, tokens=1.4, slices=0.25, slack=0.6),
    Limits(level=1.4, tokens=1.0, slices=0.5, rows=2),
    Limits(level=1.02, tokens=1.05, uneven=True),
    Limits(level=1.1, tokens=1.15, slices=0.5),
    Limits(level=1.4, tokens=1.4, slices=0.5, slack=0.6, rows=4),
    Limits(level=1.0, tokens=1.05, slices=0.5, slack=0.6),
    Limits(level=1.1, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.1, tokens=1.05, slices=0.5, slack=0.6, rows=4),
    Limits(level=1.05, tokens=1.4, slices=0.25, slack=0.6, rows=2),
    Limits(level=1.05, tokens=1.15, slices=0.5, rows=2, uneven=True),
    Limits(level=1.4, tokens=1.15, slices=0.5, slack=0.6),
    Limits(level=1.1, tokens=1.05, rows=4, uneven=True),
)
_ENOUGH = 1.002  # of perfectly even
_FEW = 2  # of them are tried of any batch that they fit; of most as many as half a second allows,
_MANY, _FIXED = 5900, 70  # which is `_MANY` / (ranks + sequences + `_FIXED`)
_PIECES = 20_000  # of sequences: more take too long, unless nothing else fits


def plan(
    lengths: Sequence[int] | Array,
    topology: Topology,
    strategy: Strategy = "balanced",
    costs: Costs | None = None,
    slack: float = MEMORY_SLACK,
    by_node: bool = True,
    routing: bool = True,
) -> Plan:
    """Plan one batch.

    Args:
        lengths: (N,) int, tokens of each sequence of the batch; zeros are allowed.
        topology: the ranks.
        strategy: how full attention is shared out. "balanced" chooses owners by length and
            work; "ring" puts each sequence on the ranks whose shards would hold it in the
            batch's order; "even" puts each on all ranks; "allgather" leaves tokens in the
            stream, which has the batch's order (a rank fetches the keys that come before its
            own).
        costs: what `balanced` weighs; those of a usual layer and cluster unless given.
        slack: how far memory lets a rank's tokens in the attention layout exceed the even
            share, as a fraction. "balanced" keeps to it, but for a rounding of two tokens a
            sequence on a ring.
        by_node: tokens of the stream stay on the node on which attention wants them, and few
            sequences are cut in it, for layers that pass states on. Else they stay on the
            rank: best for a model of full attention alone.
        routing: what attention sends between nodes goes over all of a node's ranks, and so over
            all its NICs. Else a ring steps from node to node between two ranks, and what a
            node takes from others goes to as few of its ranks as have room.

    Raises:
        ValueError: a negative length, or a strategy that is not known.
    """
    each = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(each) and each.min() < 0:
        raise ValueError(f"lengths has {each.min()} at {each.argmin()}; a length is 0 or more")
    owners: Owners | None = None
    match strategy:
        case "balanced":
            return _cheapest(each, topology, costs or Costs(), slack, by_node, routing)
        case "even":
            owners = everywhere(len(each), topology)
        case "ring":
            bounds = shard_bounds(int(each.sum()), topology.ranks)
            owners = where_they_lie(each, bounds, topology)
        case "allgather":
            pass
        case _:
            known = ", ".join(get_args(Strategy))
            raise ValueError(f"strategy {strategy!r}; it must be one of {known}")
    return build(strategy, each, owners, topology, by_node, routing)


def _cheapest(
    lengths: Array,
    topology: Topology,
    costs: Costs,
    slack: float,
    by_node: bool,
    routing: bool,
) -> Plan:
    """The cheapest of a few placings, by the cost model."""
    rest = costs.rest_both_ways * float(lengths.sum()) / topology.ranks
    perfect = float(BACKWARD.sum() * costs.attention(0 * lengths, lengths).sum()) / topology.ranks
    enough = max(_FEW, _MANY // (topology.ranks + len(lengths) + _FIXED))
    best, least = None, np.inf
    placings = _distinct(_placings(lengths, topology, costs, slack, by_node))
    for tried, owners in enumerate(placings, start=1):
        if best is not None and owners.pieces > _PIECES:
            break
        made = build("balanced", lengths, owners, topology, by_node, routing)
        if _fits(made, slack):
            made, seconds = _in_waves(made, costs, least)
            if seconds < least and costs.states:
                seconds += costs.states.layers * price_states(made, costs)[0]
            if seconds < least:
                best, least = made, seconds
        if best is not None and (tried >= enough or least <= rest + _ENOUGH * perfect):
            break
    assert best is not None
    return best


def _placings(
    lengths: Array, topology: Topology, costs: Costs, slack: float, by_node: bool
) -> Iterator[Owners]:
    """The likeliest first; the last ones are an even split, which always fits."""
    prices = Prices(lengths, topology, costs, not by_node)
    if costs.rest:
        yield undivided(prices, min(slack, MEMORY_SLACK))
    of = {(1.0, 1): prices}
    for limits in _LIMITS:
        if limits.rows > 1 and (topology.nodes == 1 or topology.ranks_per_node % limits.rows):
            continue
        if limits.uneven and (topology.nodes == 1 or not costs.rest):
            continue
        key = limits.slices, limits.rows
        if key not in of:
            of[key] = Prices(lengths, *_in_rows(topology, costs, limits.rows), not by_node, key[0])
        yield balanced(of[key], limits._replace(slack=min(slack, limits.slack)))
    yield everywhere(len(lengths), topology, prices)
    even = everywhere(len(lengths), topology)
    if costs.rest:  # nothing moves, though shards differ by a few tokens
        yield replace(even, shards="rank")
    yield even


def _distinct(placings: Iterable[Owners]) -> Iterator[Owners]:
    """The first of those that are alike."""
    seen: set[bytes] = set()
    for owners in placings:
        if owners.key not in seen:
            seen.add(owners.key)
            yield owners


def _in_rows(topology: Topology, costs: Costs, rows: int) -> tuple[Topology, Costs]:
    """Rows of ranks as if each were a node, with its share of the NICs."""
    each = topology.ranks_per_node // rows
    return Topology(topology.ranks, each), replace(costs, between=costs.between / rows)


def _in_waves(made: Plan, costs: Costs, least: float) -> tuple[Plan, float]:
    """The plan in the number of waves that makes it quickest, and its seconds, if below `least`.

    Each wave has as many heads, for all slices of a ring.
    """
    layer = price(made, costs)
    slices = max((ring.slices for ring in made.rings), default=1)
    for waves in (1, 2, 3, 4, 5):
        if costs.heads % waves or costs.kv_heads % waves or slices * waves > costs.heads:
            continue
        in_waves = replace(made, waves=waves)
        seconds = replace(layer, waves=waves).seconds
        # A wave costs latencies, and copies of keys where slices have no key head each: that
        # is the least that several can take.
        if waves > 1 and seconds < least:
            seconds = price(in_waves, costs).seconds
        if seconds < least:
            made, least = in_waves, seconds
    return made, least


def _fits(found: Plan, slack: float) -> bool:
    """Whether no rank holds too many tokens, up to the rounding of chunks.

    Where shards are uneven, both layouts keep to the slack of all activations.
    """
    shards = found.stream.tokens
    if np.ptp(shards) > 1:
        slack = min(slack, MEMORY_SLACK)
    most = room(shards, found.topology, slack)
    rounding = np.zeros(found.topology.ranks)
    for ring in found.rings:
        rounding[ring.members] += 2 * len(ring.sequences)
    return bool((np.maximum(found.attention.load, shards) <= most + rounding).all())


def build(
    strategy: str,
    lengths: Array,
    owners: Owners | None,
    topology: Topology,
    by_node: bool,
    routing: bool = True,
) -> Plan:
    """The plan of given owners; without any, full attention stays in the stream."""
    rings: tuple[Ring, ...] = ()
    if owners is None:
        stream = attention = in_order(lengths, topology.ranks)
    else:
        if not routing:
            owners = owners.flat()
        attention, home, rings = _attend(lengths, owners, topology.ranks)
        pinned = np.full(len(lengths), not by_node)
        for ring in rings:
            # Where slices of heads lie on several nodes, all tokens cross: best over all NICs.
            if routing and np.ptp(topology.node(ring.ranks), axis=2).any():
                pinned[ring.sequences] = True
        match owners.shards:
            case "even":
                shards = even_shards(home.tokens)
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


def _attend(lengths: Array, owners: Owners, ranks: int) -> tuple[Layout, Layout, tuple[Ring, ...]]:
    """The attention layout, where its tokens are at home with all their heads, and its rings."""
    owner = owners.owner
    on_ring = np.flatnonzero((owner < 0) & (lengths > 0))
    on_ring = on_ring[np.argsort(-owner[on_ring], kind="stable")]
    used, first = np.unique(-1 - owner[on_ring], return_index=True)
    parts = dict(zip(used.tolist(), np.split(on_ring, first[1:]), strict=bool(len(used))))
    held = np.zeros(ranks, np.int64)
    rings = []
    spans, homes = [], []
    for g in sorted(parts, key=lambda g: (-len(owners.grids[g]), -owners.grids[g].size, g)):
        sequences, grid = parts[g], owners.grids[g]
        seats, slices = grid.shape[0] * grid.shape[1], grid.shape[2]
        # Where a sequence's odd tokens go depends on what comes before it, so that those of
        # many short ones do not all fall on one rank.
        lean = np.cumsum(lengths[sequences]) % (2 * seats)
        chunks = np.arange(2 * seats + 1) * lengths[sequences, None] + lean[:, None]
        chunks //= 2 * seats
        if seats == 1:  # nothing to even out: all of it is early
            chunks[:, 1] = lengths[sequences]
        ring = Ring(grid, sequences, chunks, held[grid.reshape(-1)])
        held[ring.members] += np.repeat(ring.tokens, slices)
        rings.append(ring)
        # (seats, slices, S) each. A seat's tokens are at home on its ranks in turn, the early ones
        # before the late ones: most ranks then have one run of a sequence, where states pass.
        zero = np.zeros((seats, slices, len(sequences)), np.int64)
        sequence, rank = zero + sequences, zero + grid.reshape(seats, slices, 1)
        piece = zero + np.arange(slices)[:, None]
        both = (ring.early + ring.late)[:, None]
        edges = [both * (piece + i) // slices for i in (0, 1)]
        for half, size, before in (
            (np.arange(seats), ring.early, 0),
            (np.arange(2 * seats - 1, seats - 1, -1), ring.late, ring.early[:, None]),
        ):
            start = zero + ring.chunks[:, half].T[:, None]
            end = start + size[:, None]
            spans.append((sequence, start, end, rank, piece, zero + slices))
            offset = start - before
            homes.append((sequence, *(np.clip(offset + x, start, end) for x in edges), rank))
    whole = np.flatnonzero(owner >= 0)
    alone = (whole, np.zeros_like(whole), lengths[whole], owner[whole])
    spans.append((*alone, np.zeros_like(whole), np.ones_like(whole)))
    homes.append(alone)
    sequence, start, end, rank, piece, slices = _columns(spans)
    attention = Layout.stack(sequence, start, end, rank, ranks, piece, slices)
    sequence, start, end, rank = _columns(homes)
    return attention, Layout.stack(sequence, start, end, rank, ranks), tuple(rings)


def _columns(rows: Sequence[tuple[Array, ...]]) -> list[Array]:
    return [np.concatenate([x.reshape(-1) for x in column]) for column in zip(*rows, strict=True)]
