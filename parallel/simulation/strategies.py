"""One training step under our plan, under the published alternatives, and the lower bound.

All are priced by `parallel.planning.cost` on the same machine. What is the same for all (ZeRO's
traffic, the optimiser) is left out. Where a paper leaves something open, the alternative gets the
reading that is better for it, except where the text says otherwise:

- headrace: the planner that training uses. Models of full attention alone keep tokens on the rank
  where attention has them, hybrids on the node; shards may be unequal, within memory. Moves between
  layouts overlap attention and its projections, in waves of heads; the alternatives' moves do not,
  as published.
- even: every sequence in 2P chunks over all P ranks, one single ring (Transformer Engine). A
  hybrid's linear layers pass states over these chunks, as if the batch were one sequence: no
  more states than that.
- allgather: the stream in 2P chunks, rank i has chunks i and 2P − 1 − i; all keys and values are
  gathered before attention (Llama 3, arXiv 2407.21783, section 3.3.2). A hybrid's linear layers
  pass states over P chunks of the stream; moving there from the 2P chunks is not priced.
- hybrid-dp: each sequence on the fewest ranks whose memory holds it, longest first to the least
  busy ones; tokens stay there in all layers, and ranks of different groups meet only at the end of
  a step (ByteScale, arXiv 2502.21231; Megatron's dynamic context parallelism). Linear layers pass
  states as ours do, over the two chunks that a rank has of a shared sequence.
- zeppelin: arXiv 2509.21841. Our placing, with the limits that suit it best (level 1.3), stands for
  its partitioner; single rings, with routing; tokens are evened out around each mixing layer. It
  treats every mixing layer as quadratic, so tokens are moved around a hybrid's linear layers too,
  in which keys and values go round the rings.
- zeppelin-states: not a published system: zeppelin, but linear layers pass states instead.
- ulysses: heads over the fewest ranks whose memory holds the longest sequence, groups balanced by
  time; every mixing layer pays two all-to-alls (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from parallel.planning.clusters import MEMORY_SLACK, Cluster, slack
from parallel.planning.cost import LayerPrice, price, ring_travel
from parallel.planning.costs import ATTENTION_WORK, RING_TRAFFIC, Costs, Traffic
from parallel.planning.heads import fractions
from parallel.planning.layout import Array, Plan, Topology
from parallel.planning.ordering import shard_bounds
from parallel.planning.owners import on_all_ranks, rank_capacity
from parallel.planning.placing import Limits, balanced
from parallel.planning.plan import build, plan
from parallel.planning.prices import Prices
from parallel.planning.states import price_states
from parallel.simulation.models import Model, costs

STEP = 3.0  # forward and backward of a dense layer, in units of its forward
BOTH = float(ATTENTION_WORK.sum())  # forward and backward of attention, in units of its forward


@dataclass(frozen=True)
class Outcome:
    """One step of one strategy.

    Attributes:
        seconds: length of the step.
        busy: float64 (ranks,), seconds that each rank computes.
        inside, between: bytes that all ranks send inside nodes and between nodes.
        memory: activations of the fullest rank, as a multiple of the even share.
    """

    seconds: float
    busy: Array
    inside: float
    between: float
    memory: float

    @property
    def balance(self) -> float:
        """Mean seconds of computing over those of the busiest rank."""
        return float(self.busy.mean() / self.busy.max())


@dataclass(frozen=True)
class Case:
    """One batch of a model on a cluster."""

    lengths: Array
    topology: Topology
    cluster: Cluster
    model: Model
    routing: bool = True

    @property
    def share(self) -> float:
        """Tokens of an even shard."""
        return float(self.lengths.sum()) / self.topology.ranks

    @property
    def room(self) -> float:
        """Tokens with which a rank's memory is at its limit, if all layers hold as many."""
        return rank_capacity(self.lengths, self.topology, MEMORY_SLACK)

    @property
    def slack(self) -> float:
        """Fraction by which a rank's tokens in full attention may exceed the even share, by
        memory: see `clusters.slack`."""
        model = self.model
        others = model.layers * model.stream_bytes + model.linear_layers * model.mixer_bytes
        return slack(model.full_layers * model.mixer_bytes, model.mixer_bytes, others)

    def costs(self, routed: bool = False) -> Costs:
        return costs(self.cluster, self.model, routed)

    def published(self, routed: bool = False) -> Costs:
        """Costs for alternatives that split no heads and plan by full attention only."""
        return replace(self.costs(routed), heads=1, kv_heads=1, rest=0.0)

    def linear_seconds(self, tokens: Array | float) -> Array | float:
        """Seconds of all layers but full attention, forward and backward, for a rank's tokens."""
        return STEP * tokens * self.model.rest_flops / self.cluster.matmul_flops

    def attention_seconds(self) -> Array:
        """float64 (N,): seconds of each sequence's full attention on one rank, all layers, forward
        and backward."""
        zero = np.zeros(len(self.lengths))
        return BOTH * self.model.full_layers * self.costs().attention(zero, self.lengths)

    def memory(self, stream: float, mixing: float, transient: float = 0.0) -> float:
        """Activations of the fullest rank, as a multiple of the even share.

        Args:
            stream: its tokens in the stream.
            mixing: its tokens in the mixing layers, averaged over the layers.
            transient: further bytes that it holds at one time.
        """
        model = self.model
        bytes_each = model.layers * model.stream_bytes, model.layers * model.mixer_bytes
        held = stream * bytes_each[0] + mixing * bytes_each[1] + transient
        return held / (self.share * sum(bytes_each))


def lower_bound(case: Case) -> float:
    """Seconds of a step if all work were perfectly even, no sequence cut and no byte sent."""
    return float(
        case.linear_seconds(case.share) + case.attention_seconds().sum() / case.topology.ranks
    )


def our_plan(case: Case) -> Plan:
    """The plan that training would make."""
    return plan(
        case.lengths,
        case.topology,
        costs=case.costs(),
        slack=case.slack,
        by_node=case.model.linear_layers > 0,
        routing=case.routing,
    )


def headrace(case: Case) -> Outcome:
    return price_plan(case, our_plan(case))


def price_plan(case: Case, made: Plan) -> Outcome:
    """A step in which full attention follows the plan and linear layers pass states."""
    model, full = case.model, case.model.full_layers
    layer = price(made, case.costs())
    states, passed = price_states(made, case.costs())
    # A model without full attention has the other work only.
    seconds = full * layer.seconds or case.linear_seconds(float(made.stream.tokens.max()))
    sent = layer.traffic * full + passed * model.linear_layers
    mixing = (full * made.attention.load + model.linear_layers * made.stream.tokens).max()
    return Outcome(
        float(seconds + model.linear_layers * states),
        full * layer.arithmetic.sum(axis=0) + case.linear_seconds(made.stream.tokens),
        float(sent.inside.sum()),
        float(sent.between.sum()),
        case.memory(float(made.stream.tokens.max()), float(mixing) / model.layers),
    )


def even(case: Case) -> Outcome:
    ranks, full, weigh = case.topology.ranks, case.model.full_layers, case.costs()
    n = np.maximum(case.lengths, 1)
    work = weigh.pair * n * (n + 1.0) / 2 / ranks * (1 + weigh.half * 2 * ranks / n)
    work = float(np.where(case.lengths > 0, work, 0).sum())
    block = case.share * weigh.kv_bytes
    crosses = case.topology.nodes > 1
    hop = (
        weigh.latency_between + block / weigh.nic
        if crosses
        else weigh.latency_inside + block / weigh.inside
    )
    travel = (ranks - 1) * hop
    seconds = np.maximum(ATTENTION_WORK * work, RING_TRAFFIC * travel).sum()
    sent = full * (ranks - 1) * block * RING_TRAFFIC.sum()
    one = case.lengths.sum(keepdims=True)
    made = build("even", one, on_all_ranks(1, case.topology), case.topology, by_node=False)
    states, passed = _states(case, made)
    busy = np.full(ranks, full * BOTH * work + case.linear_seconds(case.share))
    over = case.topology.nodes if crosses else 0
    return Outcome(
        float(case.linear_seconds(case.share) + full * seconds + states),
        busy,
        sent * (ranks - over) + float(passed.inside.sum()),
        sent * over + float(passed.between.sum()),
        case.memory(case.share, case.share),
    )


def allgather(case: Case) -> Outcome:
    topology, full, weigh = case.topology, case.model.full_layers, case.costs()
    ranks = topology.ranks
    cu_seqlens = np.concatenate([[0], np.cumsum(case.lengths)])
    total = int(cu_seqlens[-1])
    edges = np.union1d(shard_bounds(total, 2 * ranks), cu_seqlens)
    sequence = np.searchsorted(cu_seqlens, edges[:-1], side="right") - 1
    chunk = np.searchsorted(shard_bounds(total, 2 * ranks), edges[:-1], side="right") - 1
    rank = np.minimum(chunk, 2 * ranks - 1 - chunk)
    work = np.bincount(
        rank,
        weigh.attention(edges[:-1] - cu_seqlens[sequence], edges[1:] - cu_seqlens[sequence]),
        ranks,
    )
    keys = total * weigh.kv_bytes
    # A node receives over its ranks' share of the NICs.
    sizes = np.bincount(topology.node(np.arange(ranks)))
    away = 1 - sizes / ranks
    rate = weigh.between * sizes / topology.ranks_per_node
    travel = keys * max((ranks - 1) / ranks / weigh.inside, float((away / rate).max()))
    travel += _latency(weigh, topology, ranks)
    made = build("allgather", case.lengths, None, topology, by_node=False)
    states, passed = _states(case, made)
    sent = full * keys * RING_TRAFFIC.sum() * (ranks - 1) / ranks
    between = full * keys * RING_TRAFFIC.sum() * float(away.sum())
    return Outcome(
        float(
            case.linear_seconds(case.share)
            + full * (BOTH * work.max() + RING_TRAFFIC.sum() * travel)
            + states
        ),
        full * BOTH * work + case.linear_seconds(case.share),
        max(0.0, sent * ranks - between) + float(passed.inside.sum()),
        between + float(passed.between.sum()),
        case.memory(case.share, case.share, keys),
    )


def hybrid_dp(case: Case) -> Outcome:
    topology, model, weigh = case.topology, case.model, case.published()
    ranks, full = topology.ranks, model.full_layers
    busy, ready, tokens = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    inside = between = fullest = 0.0
    for n in np.sort(case.lengths[case.lengths > 0])[::-1].tolist():
        size = 1
        while size < ranks and n / size > case.room:
            size *= 2
        size = min(size, ranks)
        first = int(ready[: ranks // size * size].reshape(-1, size).max(axis=1).argmin())
        mine = slice(first * size, (first + 1) * size)
        linear = float(case.linear_seconds(n / size))
        work: float | np.ndarray  # seconds, of the group's one rank or of each
        if size == 1:
            seconds = work = BOTH * float(weigh.attention(np.array(0), np.array(n)))
        else:
            group = Topology(size, topology.ranks_per_node)
            owners = on_all_ranks(1, group)
            made = build("hybrid-dp", np.array([n]), owners, group, by_node=False)
            layer = price(made, weigh)
            seconds, work = float(layer.finish.max(axis=1).sum()), layer.arithmetic.sum(axis=0)
            states, passed = price_states(made, weigh)
            linear += model.linear_layers * states
            sent = layer.traffic * full + passed * model.linear_layers
            inside += float(sent.inside.sum())
            between += float(sent.between.sum())
        ready[mine] = ready[mine].max() + full * seconds + linear
        busy[mine] += full * work + linear
        tokens[mine] += n / size
        fullest = max(fullest, n / size)
    # A rank computes its sequences in micro-batches as large as its memory allows.
    held = max(fullest, min(case.room, float(tokens.max())))
    return Outcome(float(ready.max()), busy, inside, between, case.memory(held, held))


def _states(case: Case, made: Plan) -> tuple[float, Traffic]:
    """Seconds and traffic of passing states over a plan's stream, in all linear layers."""
    seconds, passed = price_states(made, case.costs())
    return case.model.linear_layers * seconds, passed * case.model.linear_layers


def _latency(weigh: Costs, topology: Topology, ranks: int) -> float:
    """Seconds before the first byte arrives, in an exchange of so many adjacent ranks."""
    if ranks == 1:
        return 0.0
    return weigh.latency_between if ranks > topology.ranks_per_node else weigh.latency_inside


def zeppelin(case: Case) -> Outcome:
    return _zeppelin(case, keys_everywhere=1.0)


def zeppelin_states(case: Case) -> Outcome:
    return _zeppelin(case, keys_everywhere=0.0)


def _zeppelin(case: Case, keys_everywhere: float) -> Outcome:
    model, weigh = case.model, case.published(routed=True)
    limits = Limits(level=1.3, tokens=1.0, slack=case.slack)
    prices = Prices(case.lengths, case.topology, weigh, by_rank=True)
    owners = balanced(prices, limits)
    made = build("zeppelin", case.lengths, owners, case.topology, by_node=False)
    flat = tuple(
        replace(ring, ranks=ring.ranks.reshape(1, -1, 1)) if len(ring.ranks) > 1 else ring
        for ring in made.rings
    )
    made = replace(made, rings=flat)
    layer: LayerPrice = price(made, weigh)
    tokens, ranks = made.attention.tokens, case.topology.ranks
    mixer = model.mixer_flops / case.cluster.matmul_flops
    travel, inside, between = np.zeros(ranks), layer.traffic.inside, layer.traffic.between
    ring_inside, ring_between = np.zeros(ranks), np.zeros(ranks)
    for ring in made.rings:
        seconds, sent = ring_travel(ring, case.topology, weigh)
        travel[ring.members] += seconds
        ring_inside[ring.members] += sent.inside * RING_TRAFFIC.sum()
        ring_between[ring.members] += sent.between * RING_TRAFFIC.sum()
    travel *= keys_everywhere
    forward = np.maximum(mixer * tokens, travel).max()
    backward = np.maximum(2 * mixer * tokens, 2 * travel).max()
    linear = forward + backward + 2 * layer.moved.sum() - STEP * mixer * made.stream.tokens.max()
    unsent = 1 - keys_everywhere
    states, passed = price_states(made, case.costs())
    linear += unsent * states
    in_linear = (
        float((inside + unsent * (passed.inside - ring_inside)).sum()),
        float((between + unsent * (passed.between - ring_between)).sum()),
    )
    full, rest = model.full_layers, model.linear_layers
    return Outcome(
        float(
            case.linear_seconds(float(made.stream.tokens.max()))
            + full * layer.seconds
            + rest * linear
        ),
        full * layer.arithmetic.sum(axis=0)
        + case.linear_seconds(made.stream.tokens)
        + rest * STEP * mixer * (tokens - made.stream.tokens),
        full * float(inside.sum()) + rest * in_linear[0],
        full * float(between.sum()) + rest * in_linear[1],
        case.memory(float(made.stream.tokens.max()), float(tokens.max())),
    )


def ulysses(case: Case) -> Outcome:
    topology, model, weigh = case.topology, case.model, case.costs()
    size = 1
    most = min(topology.ranks, model.heads)
    while 2 * size <= most and case.lengths.max() / size > case.room:
        size *= 2
    groups = topology.ranks // size
    # Share of the rank with most heads: of 40 over 16 ranks it has 3.
    most_heads = float(fractions(model.heads, model.kv_heads, size)[0].max())
    seconds = case.attention_seconds() * most_heads + case.linear_seconds(case.lengths) / size
    load, tokens = np.zeros(groups), np.zeros(groups)
    for i in np.argsort(-case.lengths, kind="stable"):
        group = int(load.argmin())
        load[group] += seconds[i]
        tokens[group] += case.lengths[i] / size
    copies = max(1.0, size / model.kv_heads)
    a_token = 2 * (2 * weigh.q_bytes + weigh.kv_bytes * copies)  # both all-to-alls, both ways
    near = (min(size, topology.ranks_per_node) - 1) / size
    far = max(0, size - topology.ranks_per_node) / size
    rate = max(near / weigh.inside, far * topology.ranks_per_node / weigh.between)
    travel = model.layers * (tokens * a_token * rate + 4 * _latency(weigh, topology, size))
    sent = model.layers * float(tokens.sum()) * size * a_token
    held = max(float(case.lengths.max()) / size, min(case.room, float(tokens.max())))
    return Outcome(
        float((load + travel).max()),
        np.repeat(load, size),
        sent * near,
        sent * far,
        case.memory(held, held),
    )


STRATEGIES: dict[str, Callable[[Case], Outcome]] = {
    "headrace": headrace,
    "even": even,
    "allgather": allgather,
    "hybrid-dp": hybrid_dp,
    "zeppelin": zeppelin,
    "zeppelin-states": zeppelin_states,
    "ulysses": ulysses,
}
