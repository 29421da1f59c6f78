"""One training step under our plan, and under the published alternatives.

All are priced by `parallel.planning.cost` on the same machine, and all leave the same share of the
links to ZeRO's traffic. Where a paper leaves something open, the alternative gets the reading that
is better for it; if a system has several forms, the quickest for the batch at hand is taken.

- headrace: the planner that training uses. Models of full attention alone keep tokens on the rank
  where attention has them, hybrids on the node; shards may be unequal, within memory. Moves between
  layouts overlap attention and its projections, in waves of heads.
- even: every sequence in 2P chunks over all P ranks, one single ring: Transformer Engine's context
  parallelism of the whole cluster, which others are compared with. A hybrid's linear layers pass
  states over these chunks, as if the batch were one sequence: no more states than that.
- dp-cp: a static grid of data and context parallelism, of every degree, with single and double
  rings, all-to-alls and both (Transformer Engine, USP); sequences are packed by work.
- ulysses: the same with all-to-alls only (arXiv 2309.14509), at its best degree.
- wlb-llm: the same with all keys and values of a group gathered, packed by work and cut per
  document or per sequence, whichever is quicker (arXiv 2503.17924; Llama 3, arXiv 2407.21783).
- hybrid-dp: each sequence on a ring of its own size, by time and memory (ByteScale, arXiv
  2502.21231; Megatron's dynamic context parallelism).
- flexsp: the same with all-to-alls (arXiv 2412.01523).
- zeppelin: arXiv 2509.21841, for models of full attention alone. Our placing, with the limits that
  suit it best (level 1.3), stands for its partitioner; single rings, with routing; tokens are
  evened out around attention, which overlaps nothing.

DistCA (arXiv 2510.18121) is not among them: by its paper it overlaps all it sends and evens out all
attention, so that whatever this model said of it would be the assumption and no finding. Nobody has
published linear layers for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from parallel.planning.building import build
from parallel.planning.cost import price
from parallel.planning.costs import ATTENTION_WORK, RING_TRAFFIC
from parallel.planning.layout import Plan
from parallel.planning.owners import on_all_ranks
from parallel.planning.placing import Limits, balanced
from parallel.planning.plan import plan
from parallel.planning.planner import without_attention
from parallel.planning.prices import Prices
from parallel.planning.states import price_states
from parallel.simulation.case import BOTH, Case, Outcome, lower_bound
from parallel.simulation.groups import best, by_time, gathered
from parallel.simulation.models import Model

__all__ = ["Case", "Outcome", "headrace", "lower_bound", "our_plan", "price_plan", "strategies"]


def our_plan(case: Case) -> Plan:
    """The plan that training would make."""
    costs = case.costs()
    made = plan(
        case.lengths,
        case.topology,
        costs=costs,
        slack=case.slack,
        by_node=case.model.linear_layers > 0,
        routing=case.routing,
    )
    return made if case.model.full_layers else without_attention(case.lengths, made, costs)


def headrace(case: Case) -> Outcome:
    return price_plan(case, our_plan(case))


def price_plan(case: Case, made: Plan) -> Outcome:
    """A step in which full attention follows the plan and linear layers pass states."""
    model, full = case.model, case.model.full_layers
    layer = price(made, case.costs())
    states, passed = price_states(made, case.costs())
    sent = layer.traffic * full + passed * model.linear_layers
    mixing = (full * made.attention.load + model.linear_layers * made.stream.tokens).max()
    held = held_to_travel(case, made)
    return Outcome(
        max(float(max(1, full) * layer.seconds + model.linear_layers * states), case.zero_seconds),
        full * layer.arithmetic.sum(axis=0) + case.linear_seconds(made.stream.tokens),
        float(sent.inside.sum()),
        float(sent.between.sum()),
        case.memory(float(made.stream.tokens.max()), float(mixing) / model.layers, held),
    )


def held_to_travel(case: Case, made: Plan) -> float:
    """Bytes of the fullest rank's blocks and maps that are held only while they travel.

    Of the largest ring's keys and values two blocks; of each fragment of a cut sequence its map.
    """
    costs, ranks = case.costs(), made.topology.ranks
    blocks = max((float(ring.tokens.max()) / ring.slices for ring in made.rings), default=0.0)
    held = 2 * blocks * costs.kv_bytes
    if costs.states and made.crossing:
        states = costs.states
        of_rank = np.bincount(made.stream.rank[np.concatenate(made.crossing)], minlength=ranks)
        held += float(of_rank.max()) * states.heads * (states.M_bytes + states.E_bytes)
    return held


def even(case: Case, routed: bool = False) -> Outcome:
    """Every sequence on one ring of all ranks.

    Args:
        routed: with Zeppelin's routing, one part of its ablation.
    """
    ranks, full, weigh = case.topology.ranks, case.model.full_layers, case.costs()
    chunks = np.ceil(case.lengths / (2 * ranks)).astype(np.int64)
    tiles = 2 * ranks * np.ceil(chunks / weigh.tile)  # of each sequence
    work = weigh.pair * weigh.tile**2 * float((tiles * (tiles + 1) / 2).sum()) / ranks
    block = case.share * weigh.kv_bytes
    crosses = case.topology.nodes > 1
    hop = weigh.latency_inside + block / weigh.inside
    if crosses and routed:
        hop = weigh.latency_between + block / weigh.between + 2 * block / weigh.inside
    elif crosses:
        hop = weigh.latency_between + block / weigh.nic
    travel = (ranks - 1) * hop
    launched = (ranks - 1) * weigh.launch
    seconds = np.maximum(ATTENTION_WORK * work + launched, RING_TRAFFIC * travel).sum()
    sent = full * (ranks - 1) * block * RING_TRAFFIC.sum()
    one = case.lengths.sum(keepdims=True)
    made = build("even", one, on_all_ranks(1, case.topology), case.topology, by_node=False)
    states, passed = price_states(made, case.costs())
    states, passed = case.model.linear_layers * states, passed * case.model.linear_layers
    busy = np.full(ranks, full * BOTH * work + case.linear_seconds(case.share))
    over = case.topology.nodes if crosses else 0
    return Outcome(
        max(float(case.linear_seconds(case.share) + full * seconds + states), case.zero_seconds),
        busy,
        sent * (ranks - over) + float(passed.inside.sum()),
        sent * over + float(passed.between.sum()),
        case.memory(case.share, case.share),
    )


def zeppelin(case: Case, routed: bool = True, remapped: bool = True) -> Outcome:
    """Zeppelin, or some of its parts.

    Args:
        routed: traffic between nodes goes over all NICs.
        remapped: tokens are evened out around attention; else they stay where it has them.
    """
    weigh = case.published(routed)
    limits = Limits(level=1.3, tokens=1.0, slack=case.slack)
    prices = Prices(case.lengths, case.topology, weigh, by_rank=True)
    owners = balanced(prices, limits)
    if not remapped:
        owners = replace(owners, shards="rank")
    made = build("zeppelin", case.lengths, owners, case.topology, by_node=False)
    flat = tuple(
        replace(ring, ranks=ring.ranks.reshape(1, -1, 1)) if len(ring.ranks) > 1 else ring
        for ring in made.rings
    )
    layer = price(replace(made, rings=flat), weigh)
    tokens, full = made.attention.tokens, case.model.full_layers
    linear = case.linear_seconds(float(made.stream.tokens.max()))
    return Outcome(
        max(float(linear + full * layer.seconds), case.zero_seconds),
        full * layer.arithmetic.sum(axis=0) + case.linear_seconds(made.stream.tokens),
        full * float(layer.traffic.inside.sum()),
        full * float(layer.traffic.between.sum()),
        case.memory(float(made.stream.tokens.max()), float(tokens.max())),
    )


_STRATEGIES: dict[str, Callable[[Case], Outcome]] = {
    "headrace": headrace,
    "even": even,
    "dp-cp": best,
    "ulysses": partial(best, allowed=lambda form: form == "all-to-all"),
    "wlb-llm": gathered,
    "hybrid-dp": partial(by_time, form="ring"),
    "flexsp": partial(by_time, form="all-to-all"),
    "zeppelin": zeppelin,
}


def strategies(model: Model) -> dict[str, Callable[[Case], Outcome]]:
    """Our plan and the alternatives that are published for such a model, by name."""
    return {
        name: step
        for name, step in _STRATEGIES.items()
        if name != "zeppelin" or not model.linear_layers
    }
