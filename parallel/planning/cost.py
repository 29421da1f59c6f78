"""The cost model: what a plan costs on a cluster, in seconds and bytes.

It can be checked by hand, and is the same for every strategy:

- Attention. A run of queries costs `pair` seconds for each query-key pair of the tiles (`tile` ×
  `tile`) in which the causal mask leaves any. A ring's chunks are keys and queries of their own, so
  each fills its last tile badly. A round of a ring takes a launch more. Backward is 2.5 times
  forward (five matrix products instead of two).
- Slices of heads. A rank with a slice does its share of the arithmetic and passes on its share of
  keys and values. A key head that several slices need travels once for each of them.
- Rings. A round's transfer overlaps its arithmetic, so a ring takes the longer of the two sums. A
  round passes one block of keys and values; backward twice as much, since their gradients travel
  too. A rank works through its rings one after the other, then through the sequences it holds
  whole. A ring begins when the last of its members is free.
- Links. A transfer takes latency + bytes / bandwidth. A rank has `inside` bytes a second to its
  node; a node has `between` bytes a second over all its NICs. A ring with as many members on each
  of its nodes uses the members' share of the NICs. One that steps from node to node over a single
  pair of ranks uses one NIC; with `routed` (Zeppelin, arXiv 2509.21841, section 3.2) all of them,
  after a hop inside the node on either side.
- Moves copy rows into messages and out of them, at the speed of the GPU's memory.
- Moves between layouts take as long as the busiest rank or node; between nodes a rank has its
  share of the NICs, or with `routed` all of them. Forward moves q, k and v to attention and o back;
  backward moves the gradient of o there and those of q, k and v back. With heads in w waves, 1/w of
  the moves can overlap only projections: the first wave to leave overlaps the projections of the
  other w − 1 waves to q, k and v, the last wave to return overlaps the others' projections from o;
  backward the same, beside twice as many products. The rest overlaps arithmetic, but not the
  transfers of rings, which need the same links.
- The rest of the work is proportional to a rank's tokens. Ranks that share a ring or a cut sequence
  take the slowest one's time for it. A rank's attention begins when the rest is done on the ranks
  that its tokens come from; the longest such sum of a pass counts. Ranks that never meet, over any
  number of others, do not wait for each other.
- ZeRO's traffic of weights and gradients is the same for every plan. Links have the speed that it
  leaves them (`Costs.beside_zero`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.costs import (
    ATTENTION_WORK,
    MATMUL_WORK,
    RING_TRAFFIC,
    Costs,
    Traffic,
    move_time,
)
from parallel.planning.heads import fractions
from parallel.planning.rings import Members, chunk_seconds

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Layout, Moves, Plan, Ring


@dataclass(frozen=True)
class RingTimes:
    """When a ring runs in one layer: (start, end) seconds, forward and backward."""

    ring: Ring
    start: Array
    end: Array


@dataclass(frozen=True)
class LayerPrice:
    """One full-attention layer under one plan, and the rest of the work that comes with it.

    Seconds; an axis of 2 is (forward, backward) unless said otherwise.

    Attributes:
        arithmetic: float64 (2, ranks), attention alone.
        finish: float64 (2, ranks), when each rank has finished attention, rings' transfers
            included, layout moves not.
        moved: float64 (2,), (q, k and v; o): layout moves, the same in either pass.
        projected: float64 (2,), (to q, k and v; from o): forward projections.
        slowest: float64 (2,), attention and the rest, of the ranks that take longest.
        links: float64 (2,), the longest that rings keep a rank's links busy.
        rings: when each ring runs.
        traffic: bytes that each rank sends, forward and backward together.
        waves: number of waves of heads; moves of one overlap the arithmetic of another.
        copied: seconds of either pass in which rows are copied for moves.
    """

    arithmetic: Array
    finish: Array
    moved: Array
    projected: Array
    slowest: Array
    links: Array
    rings: list[RingTimes]
    traffic: Traffic
    waves: int
    copied: float

    @property
    def exposed(self) -> Array:
        """float64 (2,): seconds of layout moves that overlap nothing, forward and backward."""
        beside = np.outer(MATMUL_WORK, self.projected) * (1 - 1 / self.waves)
        shown = np.maximum(self.moved / self.waves - beside, 0).sum(axis=1)
        room = self.finish.max(axis=1) - self.links + beside.sum(axis=1)
        return np.maximum(shown, self.moved.sum() - room)

    @property
    def seconds(self) -> float:
        """Seconds of the layer and of the rest, forward and backward together."""
        return float((self.slowest + self.exposed).sum()) + 2 * self.copied


def price(plan: Plan, costs: Costs) -> LayerPrice:
    """Price one full-attention layer of a plan."""
    ranks, layout, slow = plan.topology.ranks, plan.attention, plan.topology.seconds
    ring_of = np.full(len(plan.cu_seqlens) - 1, -1)
    for number, ring in enumerate(plan.rings):
        ring_of[ring.sequences] = number
    rows = np.flatnonzero(ring_of[layout.sequence] < 0)
    spans = costs.attention(layout.start[rows], layout.end[rows]) * slow[layout.rank[rows]]
    whole = np.bincount(layout.rank[rows], spans, minlength=ranks).astype(np.float64)
    work = whole.copy()
    free, links = np.zeros((2, ranks)), np.zeros(ranks)
    rings: list[RingTimes] = []
    traffic = Traffic(np.zeros(ranks), np.zeros(ranks))
    if plan.rings:
        members = Members.of([ring.ranks for ring in plan.rings], plan.topology)
        share, block = _of_members(plan, ring_of, members, costs)
        work += np.bincount(members.rank, share, ranks)
        biggest = members.largest(block)
        took = members.seconds(members.largest(share), biggest, costs, plan.waves)
        travel = members.travel(biggest, costs, plan.waves)
        links += np.bincount(members.rank, travel[members.ring], ranks)
        traffic += members.sent(block) * RING_TRAFFIC.sum()
        for ring, seconds in zip(plan.rings, took.T, strict=True):
            start = free[:, ring.members].max(axis=1)
            end = start + seconds
            free[:, ring.members] = end[:, None]
            rings.append(RingTimes(ring, start, end))
    finish = free + ATTENTION_WORK[:, None] * whole
    moved, sent = _price_moves(plan, costs)
    tokens = plan.stream.tokens.max()
    return LayerPrice(
        ATTENTION_WORK[:, None] * work,
        finish,
        moved,
        np.array([costs.to_qkv, costs.from_o]) * tokens,
        _slowest(plan, costs, finish),
        RING_TRAFFIC * links.max(),
        rings,
        traffic + sent,
        plan.waves,
        copied_seconds(plan, costs),
    )


def copied_seconds(plan: Plan, costs: Costs) -> float:
    """Seconds of one pass in which rows are copied for messages and from them.

    q, k, v and o, each read and written on either side; of the rank that copies most. Nothing if
    no token moves.
    """
    moves = plan.to_attention
    if (moves.source == moves.target).all():
        return 0.0
    queries, keys = _heads(moves, costs, plan.waves)
    size = moves.tokens * (2 * costs.q_bytes * queries + costs.kv_bytes * keys)
    ranks = plan.topology.ranks
    copied = np.bincount(moves.source, size, ranks) + np.bincount(moves.target, size, ranks)
    return 2 * float(copied.max()) * costs.copy


def _slowest(plan: Plan, costs: Costs, finish: Array) -> Array:
    """(forward, backward) seconds of the ranks that take longest; see the head of this file.

    Args:
        finish: float64 (2, ranks).
    """
    tokens, every = plan.stream.tokens * plan.topology.seconds, np.arange(plan.topology.ranks)
    if not costs.rest or np.ptp(tokens) <= 1:
        return costs.rest_passes * tokens.max() + finish.max(axis=1)
    met = [plan.stream.rank[rows] for rows in plan.crossing]
    met += [ring.members for ring in plan.rings]
    met = list({ranks.tobytes(): ranks for ranks in met}.values())
    size = np.array([len(ranks) for ranks in met], np.int64)
    members = np.concatenate([*met, every[:0]])
    rest = np.outer(costs.rest_passes, _raise_to_group_max(members, size, tokens))
    source, target = plan.to_attention.source, plan.to_attention.target
    away = source != target
    pairs = np.unique(source[away] * len(tokens) + target[away])
    source, target = np.divmod(pairs, len(tokens))
    members = np.concatenate([members, np.stack([source, target], axis=1).reshape(-1)])
    size = np.append(size, np.full(len(pairs), 2))
    # `head` is one rank of each group of ranks that wait for each other. Forward and backward are
    # added up group by group: ranks that never meet do not wait between the passes either.
    head = _raise_to_group_max(members, size, every)
    source, target = np.append(source, every), np.append(target, every)
    late = np.zeros((len(tokens), 2))
    np.maximum.at(late, head[source], (rest[:, source] + finish[:, target]).T)
    return late[late.sum(axis=1).argmax()]


def _raise_to_group_max(members: Array, size: Array, values: Array) -> Array:
    """float64 or int (ranks,): each value raised to the largest in its connected groups.

    Groups that share a rank are connected. Each round takes every group's maximum, until nothing
    changes.

    Args:
        members: int64, the ranks of all groups, group by group.
        size: int64 (groups,), how many ranks each group has.
    """
    if not len(size):
        return values
    first = np.cumsum(size) - size
    while True:
        raised = values.copy()
        np.maximum.at(raised, members, np.repeat(np.maximum.reduceat(values[members], first), size))
        if np.array_equal(raised, values):
            return values
        values = raised


def _heads(spans: Layout | Moves, costs: Costs, waves: int) -> tuple[Array, Array]:
    """Each span's share of the query heads, and of the key heads: float64 (spans,) each."""
    queries, keys = np.ones(len(spans.piece)), np.ones(len(spans.piece))
    for slices in np.unique(spans.slices).tolist():
        these = spans.slices == slices
        q, k = fractions(costs.heads, costs.kv_heads, slices, waves)
        queries[these], keys[these] = q[spans.piece[these]], k[spans.piece[these]]
    return queries, keys


def _of_members(plan: Plan, ring_of: Array, members: Members, costs: Costs) -> tuple[Array, Array]:
    """Forward seconds of arithmetic of each member of the plan's rings, and bytes of its block.

    Args:
        ring_of: int64 (N,), the ring of each sequence, −1 if it is on none.

    Returns:
        float64 (members,) each.
    """
    layout, ranks = plan.attention, plan.topology.ranks
    ring = ring_of[layout.sequence]
    rows = np.flatnonzero(ring >= 0)
    rank = layout.rank[rows]
    keys = members.ring * ranks + members.rank
    order = np.argsort(keys)
    member = order[np.searchsorted(keys, ring[rows] * ranks + rank, sorter=order)]
    queries, keys = (share[rows] for share in _heads(layout, costs, plan.waves))
    seconds = chunk_seconds(plan, rows, costs) * queries * plan.topology.seconds[rank]
    size = (layout.end - layout.start)[rows] * keys * costs.kv_bytes
    count = len(members.rank)
    return np.bincount(member, seconds, count), np.bincount(member, size, count)


def _price_moves(plan: Plan, costs: Costs) -> tuple[Array, Traffic]:
    """Seconds of q, k and v one way, and of o the other way, and what a step sends.

    Backward the gradients of each go the other way.
    """
    moves = plan.to_attention
    away = moves.source != moves.target
    source, target = moves.source[away], moves.target[away]
    queries, keys = _heads(moves, costs, plan.waves)
    q_bytes = (moves.tokens * queries)[away] * costs.q_bytes
    kv_bytes = (moves.tokens * keys)[away] * costs.kv_bytes
    seconds, traffic = [], Traffic(np.zeros(plan.topology.ranks), np.zeros(plan.topology.ranks))
    for a, b, amount in ((source, target, q_bytes + kv_bytes), (target, source, q_bytes)):
        taken, sent, got = move_time(a, b, amount, plan.topology, costs)
        seconds.append(taken + plan.waves * costs.latency(sent) * (taken > 0))
        traffic += sent + got  # the other pass sends back what this one got
    return np.array(seconds), traffic
