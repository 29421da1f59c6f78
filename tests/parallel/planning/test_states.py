"""The price of states is that of their messages, and the planner takes it into account."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.clusters import load_cluster
from parallel.planning.cost import copied_seconds, price
from parallel.planning.costs import Costs, States
from parallel.planning.layout import Topology
from parallel.planning.passes import Passes
from parallel.planning.passing import Passing, least_heads
from parallel.planning.plan import plan
from parallel.planning.states import price_states
from parallel.simulation.models import MODELS
from parallel.simulation.strategies import Case, our_plan, price_plan

STATES = States(3.0, 6, M_bytes=7.0, E_bytes=100.0, passes=Passes(2e-8, 1e-8), beside=1e-9)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(lambda x: sum(x) > 24),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5)
    | st.builds(lambda nodes, each: [each] * nodes, st.integers(2, 6), st.integers(1, 4)),
)
def test_every_message_is_priced(lengths: list[int], sizes: list[int]) -> None:
    """On nodes of equal sizes, where messages are remembered from node to node, and of others."""
    where = Topology(sum(sizes), max(sizes), tuple(sizes))
    made = plan(lengths, where)
    _, traffic = price_states(made, Costs(states=STATES))
    wanted = np.zeros((2, where.ranks))  # inside nodes, between them
    for rows in made.crossing:
        for way in (1, -1):
            holders = made.stream.rank[rows][::way].tolist()
            passing = Passing(holders, STATES.heads, where, least_heads(107.0))
            for source, target, _, (first, end), whole in chain(*passing.turns()):
                size = (end - first) * (STATES.E_bytes + whole * STATES.M_bytes)
                if source != target:
                    wanted[int(where.node(source) != where.node(target)), source] += size
    np.testing.assert_allclose([traffic.inside, traffic.between], wanted)


def test_a_layer_without_states_costs_nothing() -> None:
    seconds, traffic = price_states(plan([60000], Topology(16, 8)), Costs())
    assert seconds == traffic.inside.sum() == traffic.between.sum() == 0


def test_no_state_passes_where_no_sequence_is_cut() -> None:
    made = plan([64] * 16, Topology(16, 8))
    assert price_states(made, Costs(states=STATES))[0] == 0


def test_states_overlap_what_is_computed_meanwhile() -> None:
    made, costs = plan([60000, 3000], Topology(16, 8)), Costs(states=STATES)
    nothing = Passes(0.0, 0.0)
    shown, hidden = (
        price_states(made, replace(costs, states=replace(STATES, passes=nothing, beside=seconds)))
        for seconds in (0.0, 1e-3)
    )
    assert shown[0] > hidden[0] == 0
    assert (shown[1].between == hidden[1].between).all()


def test_expensive_states_change_the_plan_of_attention() -> None:
    """With few tokens a GPU a hybrid gets a plan with slower attention and cheaper states."""
    lengths = np.array([11168, 1437, 64, 3205, 510])
    case = Case(lengths, Topology(16, 8), load_cluster("h800"), MODELS["hybrid-7b"])
    costs = case.costs()
    blind = plan(lengths, case.topology, costs=replace(costs, states=None), slack=case.slack)
    made, attention = our_plan(case), replace(costs, rest=0.0)
    assert price(made, attention).seconds > 1.1 * price(blind, attention).seconds
    assert price_states(made, costs)[0] < 0.5 * price_states(blind, costs)[0]
    assert price_plan(case, made).seconds < 0.97 * price_plan(case, blind).seconds


def test_rows_are_copied_for_moves_at_the_speed_of_memory() -> None:
    """On the rank that copies most: what it holds in either layout, read and written; nothing
    where no token moves."""
    costs = Costs(q_bytes=100.0, kv_bytes=50.0, copy=1e-3, heads=1, kv_heads=1)
    still = plan([64] * 16, Topology(16, 8), costs=costs)
    assert copied_seconds(still, costs) == 0
    made = plan([4000, 500, 500, 40], Topology(4, 2), "even")
    held = made.stream.tokens + made.attention.tokens
    # Of each token q and o, and k and v.
    assert copied_seconds(made, costs) == pytest.approx(2e-3 * held.max() * (2 * 100 + 50))
    price_of, free = price(made, costs), price(made, replace(costs, copy=0.0))
    assert price_of.seconds - free.seconds == pytest.approx(2 * copied_seconds(made, costs))
