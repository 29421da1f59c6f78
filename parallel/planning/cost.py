"""The cost model: what a plan costs on a cluster, in seconds and bytes.

Kept simple enough to be checked by hand, and the same for every strategy:

- Attention on a run of L queries costs `pair` seconds for each query-key pair that the
  causal mask leaves, times (L + half) / L: short runs fill tiles and processors badly.
  Backward is 2.5 times forward (five matrix products for two).
- Ranks that split heads have each its part of the arithmetic, and of what a ring passes on;
  key heads that several slices need are passed on, and moved, once for each of them.
- A ring's rounds overlap transfer and arithmetic, so a ring takes the longer of the two.
  Transfers pass one block of keys and values a round; backward they are twice as much
  (the gradients of keys and values travel with them). A rank works through its rings one
  after the other and then through its whole sequences; a ring begins when the last of its
  members is free. Nothing else is assumed to overlap.
- A transfer takes latency + bytes / bandwidth. Ranks of a node have `inside` bytes a second
  each; a node has `between` bytes a second over all its NICs. A ring with as many members
  on each of its nodes uses the members' share of the NICs; one that steps from node to
  node over a single pair of ranks uses one NIC, or with routing (Zeppelin, arXiv
  2509.21841, section 3.2) all of them after a hop inside the node on either side.
- Moves between layouts take the time of the busiest rank or node; between nodes a rank has its
  share of the NICs, or all of them with routing. Forward moves q, k, v in and
  o out; backward moves the gradient of o in and those of q, k, v out. With heads in w waves all
  but 1/w of it overlaps the arithmetic, but never a ring's transfers, which need the same links.
  The first wave in overlaps what projects the other w − 1 to q, k and v, the last one out what
  projects the others' o back; backward likewise, beside twice as many products.
- All other work is that of a rank's tokens. Ranks that meet in attention, or hold parts of one
  sequence, wait for each other's, forward and again backward: either is as long as the slowest
  pair takes, one for the tokens and the other for attention. Who never meets does not wait.
- ZeRO's traffic of weights and gradients is the same for every plan and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.costs import BACKWARD, PRODUCTS, TRAVEL, Costs, Traffic, move_time
from parallel.planning.heads import fractions

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Layout, Moves, Plan, Ring, Topology


@dataclass(frozen=True)
class Work:
    """When a ring runs in one layer: (start, end) seconds, forward and backward."""

    ring: Ring
    start: Array
    end: Array


@dataclass(frozen=True)
class LayerPrice:
    """One full-attention layer under one plan, and the rest of the work that comes with it.

    Pairs are (forward, backward), in seconds.

    Attributes:
        arithmetic: float64 (2, ranks), attention alone.
        finish: float64 (2, ranks), when each rank is done, transfers included.
        moved: float64 (2,), the moves of q, k and v, and of o, the same in either pass.
        projected: float64 (2,), forward, the projections to q, k and v, and from o.
        together: float64 (2,), the longest that attention and the rest take.
        links: float64 (2,), the longest that rings keep a rank's links busy.
        waves: of heads, in which moves overlap the rest.
        rings: when each ring runs.
        traffic: forward and backward together.
    """

    arithmetic: Array
    finish: Array
    moved: Array
    projected: Array
    together: Array
    links: Array
    rings: list[Work]
    traffic: Traffic
    waves: int

    @property
    def exposed(self) -> Array:
        """float64 (2,): of the moves, what overlaps nothing."""
        beside = np.outer(PRODUCTS, self.projected) * (1 - 1 / self.waves)
        shown = np.maximum(self.moved / self.waves - beside, 0).sum(axis=1)
        room = self.finish.max(axis=1) - self.links + beside.sum(axis=1)
        return np.maximum(shown, self.moved.sum() - room)

    @property
    def seconds(self) -> float:
        """Of the whole layer's attention and of the rest, forward and backward."""
        return float((self.together + self.exposed).sum())


def price(plan: Plan, costs: Costs) -> LayerPrice:
    """Price one full-attention layer of a plan."""
    ranks = plan.topology.ranks
    layout = plan.attention
    spans = costs.attention(layout.start, layout.end)
    if plan.sliced:
        spans = spans * _heads(layout, costs, plan.waves)[0]
    work = np.bincount(layout.rank, spans, minlength=ranks)
    whole = work.copy()
    free, links = np.zeros((2, ranks)), np.zeros(ranks)
    rings = []
    traffic = Traffic(np.zeros(ranks), np.zeros(ranks))
    for ring in plan.rings:
        members = ring.members
        share = ring_work(ring, costs, plan.waves)
        whole[members] -= share
        travel, sent = ring_travel(ring, plan.topology, costs, plan.waves)
        links[members] += travel
        traffic.inside[members] += sent.inside * TRAVEL.sum()
        traffic.between[members] += sent.between * TRAVEL.sum()
        start = free[:, members].max(axis=1)
        end = start + np.maximum(BACKWARD * share.max(), TRAVEL * travel)
        free[:, members] = end[:, None]
        rings.append(Work(ring, start, end))
    finish = free + BACKWARD[:, None] * np.maximum(whole, 0.0)
    moved, sent = _remap(plan, costs)
    tokens = plan.stream.tokens.max()
    return LayerPrice(
        BACKWARD[:, None] * work,
        finish,
        moved,
        np.array([costs.to_qkv, costs.from_o]) * tokens,
        _together(plan, costs, finish),
        TRAVEL * links.max(),
        rings,
        traffic + sent,
        plan.waves,
    )


def _together(plan: Plan, costs: Costs, finish: Array) -> Array:
    """Seconds, (forward, backward), of those ranks that take longest: see the head of this file."""
    tokens = plan.stream.tokens.astype(np.float64)
    if not costs.rest or np.ptp(tokens) <= 1:
        return PRODUCTS * costs.rest * tokens.max() + finish.max(axis=1)
    met = [plan.stream.rank[rows] for rows in plan.crossing]
    met += [ring.members for ring in plan.rings]
    rest = np.outer(PRODUCTS, _highest_of(met, tokens)) * costs.rest
    source, target = plan.to_attention.source, plan.to_attention.target
    away, every = source != target, np.arange(len(tokens))
    met += list(np.stack([source[away], target[away]], axis=1))
    # One of the ranks that wait for each other stands for all of them; those that never meet do
    # not wait between forward and backward either.
    head = _highest_of(met, every)
    source, target = np.append(source[away], every), np.append(target[away], every)
    late = np.zeros((len(tokens), 2))
    np.maximum.at(late, head[source], (rest[:, source] + finish[:, target]).T)
    return late[late.sum(axis=1).argmax()]


def _highest_of(groups: list[Array], values: Array) -> Array:
    """The values, raised until they are alike wherever ranks are in one group."""
    if not groups:
        return values
    members = np.concatenate(groups)
    size = np.array([len(group) for group in groups])
    first = np.cumsum(size) - size
    while True:
        raised = values.copy()
        np.maximum.at(raised, members, np.repeat(np.maximum.reduceat(values[members], first), size))
        if np.array_equal(raised, values):
            return values
        values = raised


def _heads(spans: Layout | Moves, costs: Costs, waves: int) -> tuple[Array, Array]:
    """float64 (spans,): the share of the query heads, and of the key heads, in each span."""
    queries, keys = np.ones(len(spans.piece)), np.ones(len(spans.piece))
    for slices in np.unique(spans.slices).tolist():
        these = spans.slices == slices
        q, k = fractions(costs.heads, costs.kv_heads, slices, waves)
        queries[these], keys[these] = q[spans.piece[these]], k[spans.piece[these]]
    return queries, keys


def ring_work(ring: Ring, costs: Costs, waves: int = 1) -> Array:
    """Seconds of arithmetic, forward, of each member of a ring: float64 (members,)."""
    seconds = costs.attention(ring.chunks[:, :-1], ring.chunks[:, 1:]).sum(axis=0)
    seats = ring.seats
    queries, _ = fractions(costs.heads, costs.kv_heads, ring.slices, waves)
    return np.outer(seconds[:seats] + seconds[: seats - 1 : -1], queries).reshape(-1)


def ring_travel(
    ring: Ring, topology: Topology, costs: Costs, waves: int = 1
) -> tuple[float, Traffic]:
    """Seconds that a ring's transfers take forward, and the bytes that its members send."""
    nodes, each, slices = ring.ranks.shape
    if ring.seats == 1:  # every rank has the keys of its heads already
        return 0.0, Traffic(np.zeros(slices), np.zeros(slices))
    _, keys = fractions(costs.heads, costs.kv_heads, slices, waves)
    block = ring.tokens.reshape(nodes, each, 1) * keys * costs.kv_bytes
    biggest = float(block.max(initial=0))
    node = ring.ranks // topology.ranks_per_node
    crosses = node != np.roll(node, -1, axis=1)
    # On the inner ring a member hands on all blocks but those of the member that it hands
    # them to; on the outer one, those of its peers on all nodes but the next.
    column = block.sum(axis=0)
    inner = np.broadcast_to(column.sum(axis=0) - np.roll(column, -1, axis=0), block.shape)
    outer = column - np.roll(block, -1, axis=0)
    far = node != np.roll(node, -1, axis=0)
    sent = Traffic(
        (np.where(crosses, 0.0, inner) + np.where(far, 0.0, outer)).reshape(-1),
        (np.where(crosses, inner, 0.0) + np.where(far, outer, 0.0)).reshape(-1),
    )
    hops = nodes * (each - 1)
    if crosses.any():
        if costs.routed:
            a_hop = biggest / costs.between + 2 * biggest / costs.inside
        else:
            # Every slice of heads has its own ring, and all those of a seat cross there.
            pairs = min(slices, topology.ranks_per_node)
            a_hop = biggest * max(1 / costs.nic, pairs / costs.between)
        travel = hops * (waves * costs.latency_between + a_hop)
    else:
        travel = hops * (waves * costs.latency_inside + biggest / costs.inside)
    if nodes > 1:
        on_node = min(each * slices, topology.ranks_per_node)
        mine = 1.0 if costs.routed else on_node / topology.ranks_per_node
        a_hop = on_node * biggest / (costs.between * mine)
        travel = max(travel, (nodes - 1) * (waves * costs.latency_between + a_hop))
    return float(travel), sent


def _remap(plan: Plan, costs: Costs) -> tuple[Array, Traffic]:
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
