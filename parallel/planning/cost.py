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

from parallel.planning.heads import fractions

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Layout, Moves, Plan, Ring, Topology
    from parallel.planning.states import States

BACKWARD = np.array([1.0, 2.5])  # arithmetic of attention: forward, backward
TRAVEL = np.array([1.0, 2.0])  # what goes round a ring: forward, backward
PRODUCTS = np.array([1.0, 2.0])  # of a projection: forward, backward
_SHOWN = 0.3  # of the moves, where heads come in waves: the first one's overlap nothing


@dataclass(frozen=True)
class Costs:
    """What a planner must know of the machine and of a model, by one full-attention layer.

    The defaults are a layer of 32 heads of 128, keys and values in 8, bf16, on nodes of
    eight H800 with a 400 Gb NIC each. Only ratios decide between plans, and they change
    little from one model and cluster to the next.

    Attributes:
        pair: seconds for a query-key pair, forward, all heads.
        half: tokens of a run at which half of the arithmetic's speed is reached.
        q_bytes: bytes of one token's queries (its outputs are as many).
        kv_bytes: bytes of one token's keys and values.
        heads, kv_heads: of queries, of keys. Ranks may split them; one head stays together.
        inside: bytes a second of one rank to others on its node.
        between: bytes a second of one node to the others.
        nic: bytes a second of one NIC.
        to_qkv, from_o: seconds a token, forward, of the projections to q, k and v and from o, wave
            by wave; 0 if they are not made so.
        latency_inside, latency_between: seconds before the first byte arrives.
        routed: traffic between nodes is forwarded by all ranks of its nodes, whoever has it.
            Training does not: its plans lay tokens out so that all ranks have their part.
        flops: FLOPs a second of large matrix products.
        states: the linear layers beside it, if the model has any.
        rest: seconds a token, forward, of all work but this layer's attention; 0 if not known.
    """

    pair: float = 4 * 32 * 128 / (989e12 * 0.5)
    half: float = 256.0
    q_bytes: float = 2 * 32 * 128
    kv_bytes: float = 2 * 2 * 8 * 128
    heads: int = 1
    kv_heads: int = 1
    inside: float = 160e9
    between: float = 8 * 50e9 * 0.85
    nic: float = 50e9 * 0.85
    to_qkv: float = 0.0
    from_o: float = 0.0
    latency_inside: float = 10e-6
    latency_between: float = 20e-6
    routed: bool = False
    flops: float = 989e12 * 0.6
    states: States | None = None
    rest: float = 0.0

    @property
    def rest_both_ways(self) -> float:
        """Seconds a token of `rest`, forward and backward."""
        return float(PRODUCTS.sum()) * self.rest

    def latency(self, sent: Traffic) -> float:
        """Seconds before the first byte of such a transfer arrives where it goes furthest."""
        return self.latency_between if sent.between.any() else self.latency_inside

    def attention(self, start: Array, end: Array) -> Array:
        """Seconds, forward, of queries [start, end) of a sequence against all keys up to them."""
        length = end - start
        pairs = (end * (end + 1.0) - start * (start + 1.0)) / 2
        return self.pair * pairs * (1 + self.half / np.maximum(length, 1))

    def sliced(self, slices: int) -> tuple[float, float]:
        """The share of queries' heads, and of keys', in the largest of so many slices."""
        queries, keys = fractions(self.heads, self.kv_heads, slices)
        return float(queries.max()), float(keys.max())

    def ways(self, each: int) -> list[int]:
        """Into how many slices a group of ranks, `each` on a node, may split heads."""
        powers = {1 << i for i in range(self.heads.bit_length())}
        # Over whole groups also what leaves no rank more heads than others: 24 on three nodes of 8.
        over = {h for h in range(each, self.heads + 1, each) if self.heads % h == 0}
        return sorted(h for h in powers | over if each % h == 0 or h % each == 0)

    def shared(self, n: Array, nodes: Array | int, each: int, slices: int, settled: bool) -> Array:
        """Seconds, forward and backward, on each of `nodes` · `each` ranks that share n tokens.

        An estimate for one sequence on a ring with `slices` ranks a seat; `price` has the last
        word. Tokens lie in their seat, spread over its ranks, if `settled`, else on the node.
        """
        n = np.maximum(n, 1e-9)
        seats, over = nodes * each // slices, max(1, slices // each)
        queries, keys = self.sliced(slices)
        chunks = np.where(np.equal(seats, 1), 1, 2 * np.asarray(seats))
        work = self.pair * n * (n + 1.0) / 2 / seats * queries * (1 + self.half * chunks / n)
        block = n / seats * keys * self.kv_bytes
        inner = nodes * (max(1, each // slices) - 1)
        outer = nodes // over - 1
        travel = np.maximum(
            inner * (self.latency_inside + block / self.inside),
            outer * (self.latency_between + each * block / self.between),
        )
        far = 1 - 1 / over
        near = 1 - far - 1 / (slices if settled else np.maximum(each, slices))
        moved = n * (2 * self.q_bytes + self.kv_bytes * keys * slices)
        move = np.maximum(near / each / self.inside, far / self.between) * moved / nodes
        seconds = np.maximum(work, travel) + np.maximum(BACKWARD[1] * work, TRAVEL[1] * travel)
        return seconds + 2 * _SHOWN * move


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends to its own node and to others, float64 (ranks,) each."""

    inside: Array
    between: Array

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.inside * factor, self.between * factor)


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


def move_time(
    source: Array, target: Array, amount: Array, topology: Topology, costs: Costs
) -> tuple[float, Traffic, Traffic]:
    """Seconds that transfers of `amount` bytes between ranks take; what each sends, and gets."""
    ranks = topology.ranks
    crosses = topology.node(source) != topology.node(target)
    near, far = amount * ~crosses, amount * crosses
    sent, got = (
        Traffic(np.bincount(rank, near, ranks), np.bincount(rank, far, ranks))
        for rank in (source, target)
    )
    inside = max(sent.inside.max(), got.inside.max()) / costs.inside
    node = topology.node(np.arange(ranks))
    by_node = max(np.bincount(node, sent.between).max(), np.bincount(node, got.between).max())
    between = by_node / costs.between
    if not costs.routed:
        share = min(costs.nic, costs.between / topology.ranks_per_node)
        between = max(between, max(sent.between.max(), got.between.max()) / share)
    return float(max(inside, between)), sent, got
