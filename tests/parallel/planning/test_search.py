"""How many placings are tried follows from the step that is planned, and from no clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

from parallel.planning import plan as planning
from parallel.planning.building import build
from parallel.planning.clusters import load_cluster
from parallel.planning.layout import Plan, Topology
from parallel.planning.plan import plan

LENGTHS = [40000, 21000, 9000, 7000, 5000, 3000, 1000, 500] * 4


def tried(layers: int, **limits: int) -> int:
    """How many placings are tried for a batch on 64 ranks of a model of so many layers: built, if
    none is left out by its floor. Without those in groups, which are tried beside the others."""
    costs = replace(load_cluster("h800").costs(32, 8, 128, 4096), rest=1e-7, layers=layers)
    count = 0

    def watched(*arguments: Any) -> Plan:
        nonlocal count
        count += 1
        return build(*arguments)

    nothing, no_floor = mock.Mock(return_value=[]), mock.Mock(return_value=0.0)
    with mock.patch.multiple(
        planning, build=watched, group_sizes=nothing, least_seconds=no_floor, **limits
    ):
        plan(LENGTHS, Topology(64, 8), costs=costs)
    return count


def test_a_longer_step_is_planned_with_more_tries() -> None:
    short, long = (tried(layers=layers, _LEAST_SECONDS=0) for layers in (1, 1000))
    assert short == planning._FEWEST_TRIED < long


def test_some_placings_are_tried_however_many_ranks_there_are() -> None:
    assert tried(layers=1, _TRIAL_BUDGET=1) == planning._FEWEST_TRIED


def test_a_placing_in_too_many_pieces_is_left_out_and_ends_no_search() -> None:
    """Of all that are tried, a few have more than 400 pieces, and not the last ones alone."""
    every, some = tried(layers=1000), tried(layers=1000, _MOST_PIECES=400)
    assert planning._FEWEST_TRIED < some < every
