"""The cost model: what a plan costs on a cluster, in seconds and bytes.

Kept simple enough to be checked by hand, and the same for every strategy:

- Attention on a run of L queries costs `pair` seconds for each query-key pair that the
  causal mask leaves, times (L + half) / L: short runs fill tiles and processors badly.
  Backward is 2.5 times forward (five matrix products for two).
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
- Moves between layouts take the time of the busiest rank or node and overlap nothing. Forward
  moves q, k, v in and o out; backward moves the gradient of o in and those of q, k, v out.
- ZeRO's traffic of weights and gradients is the same for every plan and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from parallel.layout import Array, Moves, Plan, Ring, Topology

BACKWARD = np.array([1.0, 2.5])  # arithmetic of attention: forward, backward
TRAVEL = np.array([1.0, 2.0])  # what goes round a ring: forward, backward


@dataclass(frozen=True)
class Costs:
    """What a planner must know of the machine and of one full-attention layer.

    The defaults are a layer of 32 heads of 128, keys and values in 8, bf16, on nodes of
    eight H800 with a 400 Gb NIC each. Only ratios decide between plans, and they change
    little from one model and cluster to the next.

    Attributes:
        pair: seconds for a query-key pair, forward, all heads.
        half: tokens of a run at which half of the arithmetic's speed is reached.
        q_bytes: bytes of one token's queries (its outputs are as many).
        kv_bytes: bytes of one token's keys and values.
        inside: bytes a second of one rank to others on its node.
        between: bytes a second of one node to the others.
        nic: bytes a second of one NIC.
        latency_inside, latency_between: seconds before the first byte arrives.
        routed: traffic between nodes is spread over the node's ranks.
    """

    pair: float = 4 * 32 * 128 / (989e12 * 0.5)
    half: float = 256.0
    q_bytes: float = 2 * 32 * 128
    kv_bytes: float = 2 * 2 * 8 * 128
    inside: float = 160e9
    between: float = 8 * 50e9 * 0.85
    nic: float = 50e9 * 0.85
    latency_inside: float = 10e-6
    latency_between: float = 20e-6
    routed: bool = True

    def without_routing(self) -> Costs:
        return replace(self, routed=False)

    def attention(self, start: Array, end: Array) -> Array:
        """Seconds, forward, of queries [start, end) of a sequence against all keys up to them."""
        length = end - start
        pairs = (end * (end + 1.0) - start * (start + 1.0)) / 2
        return self.pair * pairs * (1 + self.half / np.maximum(length, 1))

    def inside_node(self, n: Array, size: Array | int) -> Array:
        """Seconds, forward and backward, on each of `size` ranks that share n tokens."""
        work = self.pair * n * (n + 1.0) / 2 / size * (1 + self.half * _chunks(size) / (n + 1e-9))
        travel = (size - 1) * (n / size * self.kv_bytes / self.inside + self.latency_inside)
        return np.maximum(work, travel) + np.maximum(BACKWARD[1] * work, TRAVEL[1] * travel)

    def between_nodes(self, n: Array | float, nodes: Array | int, each: int) -> Array:
        """The same on each rank of `nodes` nodes of `each` ranks."""
        size = nodes * each
        work = self.pair * n * (n + 1.0) / 2 / size * (1 + self.half * 2 * size / n)
        inner = (size - 1) * (n / size * self.kv_bytes / self.inside + self.latency_inside)
        outer = (nodes - 1) * (n / nodes * self.kv_bytes / self.between + self.latency_between)
        travel = np.maximum(inner, outer)
        return np.maximum(work, travel) + np.maximum(BACKWARD[1] * work, TRAVEL[1] * travel)


def _chunks(size: Array | int) -> Array:
    """Into how many chunks a ring of `size` cuts a sequence; 1 where it stays whole."""
    return np.where(np.equal(size, 1), 1, 2 * np.asarray(size))


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
    """One full-attention layer under one plan; pairs are (forward, backward), in seconds.

    Attributes:
        arithmetic: float64 (2, ranks), attention alone.
        finish: float64 (2, ranks), when each rank is done, transfers included.
        remap: float64 (2,), both moves between the layouts.
        rings: when each ring runs.
        traffic: forward and backward together.
    """

    arithmetic: Array
    finish: Array
    remap: Array
    rings: list[Work]
    traffic: Traffic

    @property
    def seconds(self) -> float:
        """Of the whole layer's attention, forward and backward."""
        return float((self.finish.max(axis=1) + self.remap).sum())


def price(plan: Plan, costs: Costs) -> LayerPrice:
    """Price one full-attention layer of a plan."""
    ranks = plan.topology.ranks
    layout = plan.attention
    work = np.bincount(layout.rank, costs.attention(layout.start, layout.end), minlength=ranks)
    whole = work.copy()
    free = np.zeros((2, ranks))
    rings = []
    traffic = Traffic(np.zeros(ranks), np.zeros(ranks))
    for ring in plan.rings:
        members = ring.members
        share = ring_work(ring, costs)
        whole[members] -= share
        travel, sent = ring_travel(ring, plan.topology, costs)
        traffic.inside[members] += sent.inside * TRAVEL.sum()
        traffic.between[members] += sent.between * TRAVEL.sum()
        start = free[:, members].max(axis=1)
        end = start + np.maximum(BACKWARD * share.max(), TRAVEL * travel)
        free[:, members] = end[:, None]
        rings.append(Work(ring, start, end))
    finish = free + BACKWARD[:, None] * np.maximum(whole, 0.0)
    remap, moved = _remap(plan, costs)
    return LayerPrice(BACKWARD[:, None] * work, finish, remap, rings, traffic + moved)


def ring_work(ring: Ring, costs: Costs) -> Array:
    """Seconds of arithmetic, forward, of each member of a ring: float64 (G,)."""
    seconds = costs.attention(ring.chunks[:, :-1], ring.chunks[:, 1:]).sum(axis=0)
    size = ring.ranks.size
    return seconds[:size] + seconds[: size - 1 : -1]


def ring_travel(ring: Ring, topology: Topology, costs: Costs) -> tuple[float, Traffic]:
    """Seconds that a ring's transfers take forward, and the bytes that its members send."""
    nodes, each = ring.ranks.shape
    block = (ring.tokens * costs.kv_bytes).reshape(nodes, each)
    biggest = float(block.max(initial=0))
    node = ring.ranks // topology.ranks_per_node
    crosses = node != np.roll(node, -1, axis=1)
    # On the inner ring a member hands on all blocks but those of the member that it hands
    # them to; on the outer one, those of its peers on all nodes but the next.
    column = block.sum(axis=0)
    inner = np.broadcast_to(column.sum() - np.roll(column, -1), (nodes, each))
    outer = column - np.roll(block, -1, axis=0)
    sent = Traffic(
        np.where(crosses, 0.0, inner).reshape(-1),
        (np.where(crosses, inner, 0.0) + outer).reshape(-1),
    )
    hops = nodes * (each - 1)
    if crosses.any():
        if costs.routed:
            a_hop = biggest / costs.between + 2 * biggest / costs.inside
        else:
            a_hop = biggest / costs.nic
        travel = hops * (costs.latency_between + a_hop)
    else:
        travel = hops * (costs.latency_inside + biggest / costs.inside)
    if nodes > 1:
        mine = 1.0 if costs.routed else each / topology.ranks_per_node
        a_hop = each * biggest / (costs.between * mine)
        travel = max(travel, (nodes - 1) * (costs.latency_between + a_hop))
    return float(travel), sent


def _remap(plan: Plan, costs: Costs) -> tuple[Array, Traffic]:
    """Seconds (forward, backward) of both moves, and what they send."""
    inward, traffic_in = move_time(plan.to_attention, plan.topology, costs)
    outward, traffic_out = move_time(plan.to_stream, plan.topology, costs)
    qkv = costs.q_bytes + costs.kv_bytes
    forward = _sum_moves(inward, qkv, outward, costs.q_bytes, costs)
    backward = _sum_moves(inward, costs.q_bytes, outward, qkv, costs)
    once = traffic_in * (qkv + costs.q_bytes) + traffic_out * (qkv + costs.q_bytes)
    return np.array([forward, backward]), once


def _sum_moves(
    inward: float, bytes_in: float, outward: float, bytes_out: float, costs: Costs
) -> float:
    moving = [(inward, bytes_in), (outward, bytes_out)]
    return sum(each * size + costs.latency_between for each, size in moving if each > 0)


def move_time(moves: Moves, topology: Topology, costs: Costs) -> tuple[float, Traffic]:
    """Seconds for each byte of a token that moves take, and tokens that each rank sends."""
    ranks = topology.ranks
    away = moves.source != moves.target
    source, target, tokens = moves.source[away], moves.target[away], moves.tokens[away]
    crosses = topology.node(source) != topology.node(target)
    near, far = tokens * ~crosses, tokens * crosses
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
    return float(max(inside, between)), sent
