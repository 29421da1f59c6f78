"""Sizes of shards, and for whom ranks with unequal shards wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.building import build
from parallel.planning.clusters import MEMORY_SLACK
from parallel.planning.cost import price
from parallel.planning.costs import Costs
from parallel.planning.layout import Layout, Topology, moves
from parallel.planning.owners import Owners, group_sizes, in_groups, rank_capacity
from parallel.planning.plan import Strategy, plan
from parallel.planning.prices import Prices
from tests.parallel.planning.test_plan import (
    STRATEGIES,
    any_costs,
    batches,
    owners_of_tokens,
    quick,
    topologies,
)


@quick
@given(batches, topologies, st.sampled_from(STRATEGIES), any_costs, st.floats(0, 1))
def test_shards_are_even_or_within_memory(
    lengths: list[int], where: Topology, how: Strategy, costs: Costs, slack: float
) -> None:
    """They differ by one token at most, unless the rest of the work is known. Then tokens of
    either layout keep to the memory of all activations, and no rank is without any; on each node
    they are even, unless no sequence leaves the ranks that attend to it, but for the one token of
    a rank that would have none."""
    made = plan(lengths, where, how, costs, slack)
    shards, held = made.stream.tokens, made.attention.load
    if how != "balanced" or not costs.rest or np.ptp(shards) <= 1:
        assert np.ptp(shards) <= 1
        return
    room = np.ceil((1 + min(slack, MEMORY_SLACK)) * sum(lengths) / where.ranks)
    pieces = sum(len(ring.sequences) for ring in made.rings)
    assert shards.min() >= 1
    assert max(shards.max(), held.max()) <= room + 2 * pieces
    node = where.node(np.arange(where.ranks))
    even = [np.ptp(shards[node == one]) <= 1 for one in range(where.nodes)]
    lie, meet = (
        set(zip(layout.sequence.tolist(), layout.rank.tolist(), strict=True))
        for layout in (made.stream, made.attention)
    )
    lie = {(sequence, rank) for sequence, rank in lie if shards[rank] > 1}
    assert all(even) or lie <= meet


@quick
@given(batches, topologies, st.floats(0, 1))
def test_groups_have_room_for_their_sequences(
    lengths: list[int], where: Topology, slack: float
) -> None:
    """One way gives each sequence the fewest ranks with room for it; none gives any fewer."""
    each = np.array(lengths, np.int64)
    prices = Prices(each, where, Costs(rest=1e-6), True)
    limit = rank_capacity(each, where, slack)
    ways = [sizes for _, sizes in group_sizes(prices, slack)]
    for n, size in zip(lengths, np.min(ways, axis=0).tolist(), strict=True):
        assert n <= size * limit or size == where.ranks
        fewer = max(1 << i for i in range(5) if 1 << i < max(size, 2))
        assert size == 1 or n > fewer * limit
    for sizes in ways:
        for owners in in_groups(prices, sizes, slack):
            grids = [1 if rank >= 0 else owners.grids[-1 - rank].size for rank in owners.owner]
            assert all(found >= given for found, given in zip(grids, sizes.tolist(), strict=True))
            made = build("balanced", each, owners, where, by_node=True)
            chunks = sum(2 * len(ring.sequences) for ring in made.rings)
            assert made.attention.load.max() <= limit + chunks
            for layout in (made.stream, made.attention):
                owners_of_tokens(layout, made.cu_seqlens)


@pytest.mark.parametrize("shards", ["node", "rank"])
def test_a_rank_without_attention_work_holds_one_token(shards: Any) -> None:
    """Eight of nine ranks have a sequence each; the ninth, alone on its node, has none."""
    ring = np.arange(8).reshape(1, 8, 1)
    owners = Owners(np.array([-1]), [ring], shards)
    made = build("balanced", np.array([8000]), owners, Topology(9, 8), by_node=True)
    assert made.attention.tokens.tolist() == [1000] * 8 + [0]
    assert made.stream.tokens.tolist()[-1] == 1
    assert made.stream.tokens.sum() == 8000
    assert np.bincount(made.stream.rank, made.stream.end - made.stream.start).min() == 1


def test_a_node_with_more_attention_work_has_fewer_tokens() -> None:
    """One node has a long sequence, the others many short ones, which are most of the tokens."""
    lengths = [3000] + [100] * 90
    costs = Costs(rest=1e-7, heads=8, kv_heads=8)
    made = plan(lengths, Topology(6, 2), costs=costs)
    even = plan(lengths, Topology(6, 2), costs=replace(costs, rest=0.0))
    (ring,) = (ring for ring in made.rings if 0 in ring.sequences)
    assert made.stream.tokens[ring.members].max() < 0.99 * even.stream.tokens.min()
    assert price(made, costs).seconds < price(even, costs).seconds


def test_a_step_is_as_long_as_the_slowest_pair_that_meets() -> None:
    """Rank 1 has most tokens, rank 0 most attention work; they wait for each other if one of them
    holds tokens that the other attends to."""
    costs = Costs(rest=1e-6, heads=2, kv_heads=2)
    lengths, where = np.array([3000, 3500]), Topology(2, 1)
    apart = build("balanced", lengths, Owners(np.array([0, 1]), [], "node"), where, True)
    found = price(apart, costs)
    rest = np.outer([1, 2], apart.stream.tokens) * costs.rest
    assert apart.stream.tokens.tolist() == [3000, 3500]
    np.testing.assert_allclose(found.slowest, (rest + found.finish).max(axis=1))
    moved = replace(apart, stream=in_shards(apart.stream, [2900, 3600]))
    moved = replace(moved, to_attention=moves(moved.stream, apart.attention, apart.cu_seqlens))
    found = price(moved, costs)
    rest = np.outer([1, 2], moved.stream.tokens) * costs.rest
    np.testing.assert_allclose(found.slowest, rest.max(axis=1) + found.finish.max(axis=1))


def test_ranks_that_never_meet_do_not_wait_between_the_passes() -> None:
    """Rank 1 is slower forward, where its many tokens count most, and rank 0 backward."""
    lengths, costs = np.array([3000] + [100] * 40), Costs(heads=2, kv_heads=2)
    seconds = costs.attention(0 * lengths, lengths)
    costs = replace(costs, rest=1.1 * (seconds[0] - seconds[1:].sum()) / 1000)
    owners = Owners(np.minimum(np.arange(41), 1), [], "rank")
    found = price(build("balanced", lengths, owners, Topology(2, 1), True), costs)
    passes = np.outer([1, 2], [3000, 4000]) * costs.rest + found.finish
    assert passes.argmax(axis=1).tolist() == [1, 0]
    assert found.seconds == pytest.approx(passes.sum(axis=0).max())
    assert found.seconds < 0.999 * passes.max(axis=1).sum()


def in_shards(stream: Layout, shards: list[int]) -> Layout:
    """Two sequences whole on two ranks; the first one's last tokens are given to the second."""
    first, second = stream.tokens.tolist()
    sequence, rank = np.array([0, 0, 1]), np.array([0, 1, 1])
    start, end = np.array([0, shards[0], 0]), np.array([shards[0], first, second])
    return Layout.stack(sequence, start, end, rank, 2)
