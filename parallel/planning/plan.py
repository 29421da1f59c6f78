"""The plan of a batch: from its lengths alone, where every token lies in every kind of layer.

    lengths ── placing ──▶ owners ──▶ attention layout, rings ──▶ stream, near home ──▶ moves

`plan` builds and prices several placings this way and returns the cheapest. It is a pure function:
every rank computes the same plan, once a batch, on the CPU. numpy only.

Tried and left: spreading a long sequence over a share of the nodes fixed beforehand. Batches of few
long sequences lost a third more to the bound than with the fewest nodes that have time and room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal, get_args

import numpy as np

from parallel.planning.building import build
from parallel.planning.clusters import MEMORY_SLACK
from parallel.planning.cost import price
from parallel.planning.costs import ATTENTION_WORK, Costs
from parallel.planning.layout import Array, Layout, Moves, Plan, Ring, Round, Topology
from parallel.planning.ordering import shard_bounds
from parallel.planning.owners import (
    Owners,
    group_sizes,
    in_groups,
    least_seconds,
    on_all_ranks,
    on_stream_ranks,
    rank_capacity,
)
from parallel.planning.placing import Limits, balanced
from parallel.planning.prices import Prices
from parallel.planning.states import price_states

__all__ = ["Costs", "Layout", "Moves", "Plan", "Ring", "Round", "Strategy", "Topology", "plan"]

Strategy = Literal["balanced", "ring", "even", "allgather"]

# Limits of the balanced placings, the likeliest first; between them the ways of `group_sizes` are
# tried. What each field trades:
#   level    higher: a long sequence is shared by fewer ranks, and nodes are busy less evenly
#   tokens, slack    higher: work is more even, and more tokens move (or take memory)
#   slices   lower: heads are split less, so that more waves fit and hide more of the moves
#   rows     higher: a ring over nodes may have a size nearer to what it needs
#   uneven   fewer tokens move, since attention and the rest are made even together
# Chosen greedily, each for what it added on some 400 batches of the shipped length distributions,
# of others, and of few long sequences, on 8 to 256 GPUs. The first seventeen do as well in the
# mean, and lose up to 12 % on single batches.
_LIMITS = (
    Limits(level=1.05, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.0, tokens=1.05, slices=0.5, slack=0.6),
    Limits(level=1.2, tokens=1.0, slices=0.5),
    Limits(level=1.4, tokens=1.4, slices=0.5, slack=0.6, rows=2),
    Limits(level=1.2, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.0, tokens=1.15, slices=0.5, rows=2, uneven=True),
    Limits(level=1.02, tokens=1.05, slices=0.25, slack=0.3),
    Limits(level=1.0, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.1, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.1, tokens=1.05, slices=0.5, uneven=True),
    Limits(level=1.02, tokens=1.0, slices=0.5, rows=4),
    Limits(level=1.4, tokens=1.15, slices=0.5, slack=0.6),
    Limits(level=1.4, tokens=1.0, slices=0.5, rows=2),
    Limits(level=1.1, tokens=1.0),
    Limits(level=1.02, tokens=1.15, slices=0.25),
    Limits(level=1.05, tokens=1.15, slices=0.5, rows=2, uneven=True),
    Limits(level=1.05, tokens=1.4, slices=0.25, slack=0.6),
    Limits(level=1.1, tokens=1.05, slices=0.5, slack=0.6, rows=4),
    Limits(level=1.02, tokens=1.05, uneven=True),
    Limits(level=1.0, tokens=1.4, slices=0.25, slack=0.6),
    Limits(level=1.0, tokens=1.0, slices=0.5),
    Limits(level=1.05, tokens=1.4, slices=0.25, slack=0.6, rows=2),
    Limits(level=1.1, tokens=1.15, slices=0.5, slack=0.6),
    Limits(level=1.4, tokens=1.15),
    Limits(level=1.02, tokens=1.15, slices=0.5, uneven=True),
    Limits(level=1.2, tokens=1.15, slices=0.5, rows=2),
)
# Ways to group sequences that are tried, the likeliest ones: so many, or one for three placings.
_GROUPINGS = 4
# The search ends when a plan takes at most this multiple of perfectly even work.
_GOOD_ENOUGH = 1.002
# A way to group sequences is tried if this share of its estimated seconds is below the best plan's.
_ESTIMATED = 0.98
# `least_seconds` times this is not built if a quicker plan is known: chunks and shards are rounded.
_ROUNDED = 0.999
# Placings tried at least. As many more are tried as half a second allows, or a tenth of the step
# that is planned: by measurement a second is _TRIAL_BUDGET / (ranks + sequences + _TRIAL_OVERHEAD)
# placings. No clock is asked: all ranks must try as many.
_FEWEST_TRIED = 4
_TRIAL_BUDGET, _TRIAL_OVERHEAD = 22000, 70
_LEAST_SECONDS, _SHARE_OF_STEP = 0.5, 0.1
# A placing that cuts the batch into more pieces takes too long to build: it is left out, unless
# nothing has fitted yet.
_MOST_PIECES = 20_000


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
        strategy: how full attention is divided. "balanced" chooses owners by length and work;
            "ring" puts each sequence on the ranks whose shards would hold it if the batch were
            cut in order; "even" puts each on all ranks; "allgather" leaves tokens in the stream,
            in the batch's order (a rank fetches the keys before its own).
        costs: by which "balanced" chooses; `Costs()` unless given.
        slack: fraction by which memory lets a rank's tokens in the attention layout exceed the
            even share. "balanced" keeps to it, up to two tokens a sequence on a ring, by which
            chunks are rounded.
        by_node: the stream keeps tokens on the node where attention has them and cuts few
            sequences: for models with layers that pass states. Else it keeps them on the rank:
            best if all layers that mix tokens are full attention.
        routing: traffic of attention between nodes goes over all ranks of a node, and so over
            all its NICs. Else a ring steps from node to node between two ranks, and the tokens
            that a node takes go to as few of its ranks as have room.

    Raises:
        ValueError: a length is negative, or the strategy is unknown.
    """
    each = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(each) and each.min() < 0:
        raise ValueError(f"lengths has {each.min()} at {each.argmin()}; a length is 0 or more")
    owners: Owners | None = None
    match strategy:
        case "balanced":
            return _cheapest(each, topology, costs or Costs(), slack, by_node, routing)
        case "even":
            owners = on_all_ranks(len(each), topology)
        case "ring":
            bounds = shard_bounds(int(each.sum()), topology.ranks)
            owners = on_stream_ranks(each, bounds, topology)
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
    """The cheapest of several placings, by the cost model."""
    rest = costs.rest_both_ways * float(lengths.sum()) / topology.ranks
    perfect = (
        float(ATTENTION_WORK.sum() * costs.attention(0 * lengths, lengths).sum()) / topology.ranks
    )
    seconds = max(_LEAST_SECONDS, _SHARE_OF_STEP * costs.layers * (rest + perfect))
    a_second = _TRIAL_BUDGET / (topology.ranks + len(lengths) + _TRIAL_OVERHEAD)
    enough = max(_FEWEST_TRIED, int(seconds * a_second))
    best, least = None, np.inf
    seen: set[bytes] = set()
    tried = 0
    groupings = min(_GROUPINGS, max(1, enough // 3))
    for bound, make in _placings(lengths, topology, costs, slack, by_node, groupings):
        if best is not None and (tried >= enough or least <= rest + _GOOD_ENOUGH * perfect):
            break
        tried += not bound  # groups are tried beside: few have a chance
        for owners in make() if _ESTIMATED * bound < least else []:
            if owners.key in seen or (best is not None and owners.pieces > _MOST_PIECES):
                continue
            seen.add(owners.key)
            built = owners if routing else owners.flat()
            floor = least_seconds(built, lengths, topology, costs)
            if _ROUNDED * floor >= least:
                continue
            made = build("balanced", lengths, owners, topology, by_node, routing)
            if not _fits(made, slack):
                continue
            made, seconds = _in_waves(made, costs, least)
            if seconds < least and costs.states:
                seconds += costs.states.layers * price_states(made, costs)[0]
            if seconds < least:
                best, least = made, seconds
    if best is None:  # shards that follow the ranks' speeds are larger than memory
        even, alike = on_all_ranks(len(lengths), topology), replace(topology, speeds=())
        best = build("balanced", lengths, even, alike, by_node, routing)
    return replace(best, topology=topology)


def _placings(
    lengths: Array, topology: Topology, costs: Costs, slack: float, by_node: bool, groupings: int
) -> Iterator[tuple[float, Callable[[], list[Owners]]]]:
    """The placings to try, the likeliest first: seconds that one takes at least, and how it is
    made. The last is an even split, which always fits."""
    prices = Prices(lengths, topology, costs, not by_node)
    groups: list[tuple[float, Callable[[], list[Owners]]]] = []
    if costs.rest:
        room = min(slack, MEMORY_SLACK)
        for least, sizes in group_sizes(prices, room)[:groupings]:
            groups.append((least, partial(in_groups, prices, sizes, room)))
    ways = iter(groups)
    in_rows = {1: prices}
    for limits in _LIMITS:
        if limits.rows > 1 and (topology.nodes == 1 or topology.ranks_per_node % limits.rows):
            continue
        if limits.uneven and (topology.nodes == 1 or not costs.rest):
            continue
        if limits.rows not in in_rows:
            parts = _in_rows(topology, costs, limits.rows)
            in_rows[limits.rows] = Prices(lengths, *parts, not by_node)
        yield from islice(ways, 1)
        within = limits._replace(slack=min(slack, limits.slack))
        yield 0.0, partial(_balanced, in_rows[limits.rows], within)
    yield from ways
    yield 0.0, lambda: [on_all_ranks(len(lengths), topology, prices)]
    even = on_all_ranks(len(lengths), topology)
    if costs.rest:  # shards as attention has them, a few tokens apart: then nothing moves
        yield 0.0, lambda: [replace(even, shards="rank")]
    yield 0.0, lambda: [even]


def _balanced(prices: Prices, limits: Limits) -> list[Owners]:
    return [balanced(prices.with_slices(limits.slices), limits)]


def _in_rows(topology: Topology, costs: Costs, rows: int) -> tuple[Topology, Costs]:
    """The topology in which each node is cut into `rows` nodes, and the costs with their NICs."""
    each = topology.ranks_per_node // rows
    sizes = tuple(min(each, size - at) for size in topology.sizes for at in range(0, size, each))
    return replace(topology, ranks_per_node=each, sizes=sizes), replace(
        costs, between=costs.between / rows
    )


def _in_waves(made: Plan, costs: Costs, least: float) -> tuple[Plan, float]:
    """The plan with the quickest number of waves, and its seconds; `least` if none is quicker.

    The number divides the query heads and the key heads, and leaves each slice a query head.
    """
    layer = price(made, costs)
    slices = max((ring.slices for ring in made.rings), default=1)
    # Lower bounds: more waves add latencies, and copies of key heads where slices share one.
    bounds = sorted(
        (replace(layer, waves=waves).seconds, waves)
        for waves in (1, 2, 3, 4, 5)
        if not (costs.heads % waves or costs.kv_heads % waves or slices * waves > costs.heads)
    )
    for bound, waves in bounds:
        if bound >= least:
            break
        in_waves = replace(made, waves=waves)
        seconds = price(in_waves, costs).seconds if waves > 1 else bound
        if seconds < least:
            made, least = in_waves, seconds
    return made, least


def _fits(found: Plan, slack: float) -> bool:
    """Whether every rank's tokens are within its memory, in both layouts, up to rounded chunks.

    If shards are uneven, all activations are: then `MEMORY_SLACK` holds for both layouts.
    """
    shards = found.stream.tokens
    if np.ptp(shards) > 1:
        slack = min(slack, MEMORY_SLACK)
    most = rank_capacity(shards, found.topology, slack)
    rounding = np.zeros(found.topology.ranks)
    for ring in found.rings:
        rounding[ring.members] += 2 * len(ring.sequences)
    return bool((np.maximum(found.attention.load, shards) <= most + rounding).all())
