"""What the planner knows of a machine and of a model, and formulas that need nothing more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.heads import fractions
from parallel.planning.passes import Passes

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Topology

# (forward, backward) in units of the forward pass.
ATTENTION_WORK = np.array([1.0, 2.5])  # two matrix products; five
RING_TRAFFIC = np.array([1.0, 2.0])  # keys and values; these and their gradients
MATMUL_WORK = np.array([1.0, 2.0])  # one product; one for each operand's gradient
# Share of a layout move's time that no arithmetic hides, in the estimate `ring_seconds`: the first
# wave of heads has nothing beside which to travel. `cost.price` counts waves instead.
_EXPOSED = 0.3
_MOST_SHARED = 0.9  # share of the links' time that ZeRO's traffic takes at most


@dataclass(frozen=True)
class States:
    """What the planner knows of linear layers, whose states pass from rank to rank.

    Attributes:
        layers: linear layers for each full-attention layer.
        heads: heads of a state; ranks divide them among themselves.
        M_bytes, E_bytes: bytes of M and of E of one head's map S_out = M · S_in + E.
        passes: seconds a token of each pass over the tokens of a cut sequence, all heads.
        beside: forward seconds a token of what is computed while states travel.
        halo_bytes: bytes of the tokens before a fragment that its short convolution needs.
    """

    layers: float
    heads: int
    M_bytes: float
    E_bytes: float
    passes: Passes
    beside: float
    halo_bytes: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Speeds and sizes by which plans are priced, for one full-attention layer.

    The defaults describe a layer of 32 query heads and 8 key heads of 128 channels in bf16, on
    nodes of eight H800 with one 400 Gb NIC a GPU; with `heads` = `kv_heads` = 1 no plan splits
    heads. Only ratios decide between plans.

    Attributes:
        pair: forward seconds for one query-key pair, all heads.
        tile: rows of queries, and of keys, that the kernel takes at a time; a tile that is not full
            takes as long as one that is, and one on the diagonal as long as one below it.
        launch: seconds that a kernel takes at least.
        copy: seconds a byte that is read or written in the GPU's memory.
        q_bytes: bytes of one token's queries; its outputs are as many.
        kv_bytes: bytes of one token's keys and values.
        heads, kv_heads: query heads and key heads; the number of slices is at most `heads`.
        inside: bytes a second from one rank to the others on its node.
        between: bytes a second from one node to the others, over all its NICs.
        nic: bytes a second over one NIC.
        to_qkv, from_o: forward seconds a token of the projections to q, k and v, and from o, if
            the layer makes them wave by wave, else 0.
        latency_inside, latency_between: seconds before the first byte arrives.
        routed: any rank's traffic between nodes goes over all ranks of its node (Zeppelin's
            routing). Training forwards nothing: its plans give every rank its part to send.
        flops: FLOPs a second of large matrix products.
        states: the linear layers beside this one; None if the model has none.
        rest: forward seconds a token of everything but this layer's attention; 0 if not known.
        rest_backward: the same of the backward pass, in units of `rest`.
        weights: bytes of weights and gradients that ZeRO brings to each rank for a batch, for each
            full-attention layer. `beside_zero` takes its traffic off the links.
        layers: full-attention layers of the model: a step is as many of these layers, each with
            its rest.
    """

    pair: float = 4 * 32 * 128 / (989e12 * 0.5)
    tile: int = 128
    launch: float = 0.0
    copy: float = 0.0
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
    rest_backward: float = 2.0
    weights: float = 0.0
    layers: int = 1

    @property
    def rest_passes(self) -> Array:
        """float64 (2,): seconds a token of `rest`, forward and backward."""
        return self.rest * np.array([1.0, self.rest_backward])

    @property
    def rest_both_ways(self) -> float:
        """Seconds a token of `rest`, forward and backward together."""
        return float(self.rest_passes.sum())

    def even_seconds(self, lengths: Array, ranks: int) -> float:
        """Seconds of a layer and of the rest if a batch's work were even over the ranks."""
        attention = self.attention(np.zeros_like(lengths), lengths).sum()
        work = ATTENTION_WORK.sum() * attention + self.rest_both_ways * lengths.sum()
        return float(work) / ranks

    def zero_seconds(self, topology: Topology) -> tuple[float, float]:
        """Seconds a batch in which ZeRO's traffic uses the links inside nodes and between them.

        Rings over all ranks: each node gets what it lacks once, over all its NICs, and passes it
        from rank to rank.
        """
        each, nodes = min(topology.ranks_per_node, topology.ranks), topology.nodes
        inside = self.weights * (each - 1) / each / self.inside
        return inside, self.weights * (nodes - 1) / nodes / self.between

    def beside_zero(self, lengths: Array, topology: Topology) -> Costs:
        """The costs with the links that ZeRO's traffic leaves to a batch of these lengths.

        It is spread evenly over the step; if it takes most of that, the step is longer too.
        """
        inside, between = self.zero_seconds(topology)
        step = self.even_seconds(lengths, topology.ranks)
        step = max(step, inside / _MOST_SHARED, between / _MOST_SHARED)
        if not step:
            return self
        near, far = 1 - inside / step, 1 - between / step
        return replace(
            self,
            inside=self.inside * near,
            between=self.between * far,
            nic=self.nic * far,
            weights=0.0,
        )

    def latency(self, sent: Traffic) -> float:
        """Seconds before the first byte arrives: between nodes if anything crosses, else inside."""
        return self.latency_between if sent.between.any() else self.latency_inside

    @property
    def tile_seconds(self) -> float:
        """Forward seconds of one tile of queries against one of keys, all heads."""
        return self.pair * self.tile**2

    def tiles(self, tokens: Array) -> Array:
        """How many tiles hold so many tokens."""
        return -(-tokens // self.tile)

    def attention(self, start: Array, end: Array) -> Array:
        """Forward seconds of queries [start, end) of a sequence against keys [0, own position].

        Args:
            start, end: (runs,) int, positions in the sequence.

        Returns:
            float64 (runs,).
        """
        before, last = self.tiles(start), self.tiles(end)
        runs = np.maximum(self.tiles(end - start), 1)  # tiles of queries
        # All tiles but the last end a multiple of the tile after `start`, the last one at `end`.
        tiles = (runs - 1) * before + runs * (runs - 1.0) / 2 + last
        return self.tile_seconds * np.where(end > start, tiles, 0.0)

    def chunks(self, size: Array, count: Array | int) -> Array:
        """Forward seconds of sequences in `count` chunks of `size` tokens, keys of their own."""
        tiles = count * self.tiles(size)
        return self.tile_seconds * tiles * (tiles + 1) / 2

    def largest_slice(self, slices: int) -> tuple[float, float]:
        """The largest slice's share of the query heads, and the largest one's of the key heads."""
        queries, keys = fractions(self.heads, self.kv_heads, slices)
        return float(queries.max()), float(keys.max())

    def slice_counts(self, each: int) -> list[int]:
        """Numbers of slices into which ranks, `each` on a node, may split heads, rising."""
        powers = {1 << i for i in range(self.heads.bit_length())}
        # A multiple of `each` that divides the heads, power of two or not: 24 on three nodes of 8.
        over = {h for h in range(each, self.heads + 1, each) if self.heads % h == 0}
        return sorted(h for h in powers | over if each % h == 0 or h % each == 0)

    def ring_seconds(
        self, n: Array, nodes: Array | int, each: int, slices: int, by_rank: bool
    ) -> Array:
        """Estimated seconds, forward and backward, on each rank of a ring that shares n tokens.

        By it sequences are placed; finished plans are priced by `cost.price`. Arguments are those
        of `ring_parts`.
        """
        return self.ring_total(*self.ring_parts(n, nodes, each, slices, by_rank))

    @staticmethod
    def ring_total(work: Array, travel: Array, move: Array) -> Array:
        """Seconds, forward and backward, of a ring's parts."""
        seconds = np.maximum(work, travel) + np.maximum(
            ATTENTION_WORK[1] * work, RING_TRAFFIC[1] * travel
        )
        return seconds + 2 * _EXPOSED * move

    def ring_parts(
        self, n: Array, nodes: Array | int, each: int, slices: int, by_rank: bool
    ) -> tuple[Array, Array, Array]:
        """Forward seconds of a ring that shares n tokens: arithmetic, transfers, layout moves.

        Args:
            n: tokens of a sequence, any shape that broadcasts with `nodes`.
            nodes, each: the ring has nodes · each ranks, `each` on a node.
            slices: ranks of one seat, which split its heads; they may be several nodes' ranks.
            by_rank: the stream keeps a token on one of its seat's ranks; else on its node.
        """
        n = np.maximum(n, 1e-9)
        seats, over = nodes * each // slices, max(1, slices // each)
        queries, keys = self.largest_slice(slices)
        chunks = np.where(np.equal(seats, 1), 1, 2 * np.asarray(seats))
        work = self.chunks(n / chunks, chunks) / seats * queries
        block = n / seats * keys * self.kv_bytes
        inner = nodes * (max(1, each // slices) - 1)
        outer = nodes // over - 1
        work = work + (seats - 1) * self.launch
        travel = np.maximum(
            inner * (self.latency_inside + block / self.inside),
            outer * (self.latency_between + each * block / self.between),
        )
        far = 1 - 1 / over
        near = 1 - far - 1 / (slices if by_rank else np.maximum(each, slices))
        moved = n * (2 * self.q_bytes + self.kv_bytes * keys * slices)
        move = np.maximum(near / each / self.inside, far / self.between) * moved / nodes
        return work, travel, move


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
    """Time of simultaneous transfers: that of the busiest rank or node, latency left out.

    Args:
        source, target: (transfers,) int, ranks.
        amount: (transfers,) bytes.

    Returns:
        seconds, and the traffic that each rank sends, and that each rank receives.
    """
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
