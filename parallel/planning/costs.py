"""What a planner must know of a machine and of a model, and the prices that follow at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.heads import fractions

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Topology

BACKWARD = np.array([1.0, 2.5])  # arithmetic of attention: forward, backward
TRAVEL = np.array([1.0, 2.0])  # what goes round a ring: forward, backward
PRODUCTS = np.array([1.0, 2.0])  # of a projection: forward, backward
_SHOWN = 0.3  # of the moves, where heads come in waves: the first one's overlap nothing


@dataclass(frozen=True)
class States:
    """What a planner must know of a linear layer whose states pass.

    Attributes:
        layers: how many there are, for each one of full attention.
        heads: of its states; ranks divide them.
        M_bytes, E_bytes: of one head's affine map.
        map_flops: a token, of making its fragment's map, forward and backward together.
        beside_flops: a token, forward, of what is computed while states travel.
    """

    layers: float
    heads: int
    M_bytes: float
    E_bytes: float
    map_flops: float
    beside_flops: float


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
