"""A placing whose floor is above the best plan's seconds is not built; nothing is lost by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from parallel.planning import plan as planning
from parallel.planning.clusters import load_cluster
from parallel.planning.cost import price
from parallel.planning.costs import Costs
from parallel.planning.layout import Array, Plan, Topology
from parallel.planning.owners import Owners, least_seconds

COSTS = replace(load_cluster("h800").costs(32, 8, 128, 4096), rest=1e-7, layers=30)
RNG = np.random.default_rng(5)
MIXED = np.append(RNG.integers(20, 3000, 150), RNG.integers(5000, 90_000, 9))
FEW = RNG.integers(9000, 200_000, 11)
TOPOLOGIES = {
    "four nodes": Topology(32, 8),
    "nodes of four ranks": Topology(16, 4),
    "a rank is missing": Topology(31, 8, (8, 7, 8, 8)),
    "a node is slow": Topology(24, 8, speeds=(1.0,) * 8 + (0.7,) * 8 + (1.0,) * 8),
}


def searched(
    lengths: Array, topology: Topology, costs: Costs, without_floor: bool = False
) -> tuple[Plan, list[tuple[Owners, Plan]]]:
    """The plan, and each placing that was built, with its plan."""
    found: list[tuple[Owners, Plan]] = []

    def watched(strategy: str, batch: Array, owners: Owners, *rest: Any) -> Plan:
        made = build(strategy, batch, owners, *rest)
        found.append((owners, made))
        return made

    build = planning.build
    floor = mock.Mock(return_value=0.0) if without_floor else least_seconds
    with mock.patch.multiple(planning, build=watched, least_seconds=floor):
        made = planning.plan(lengths, topology, costs=costs)
    return made, found


@pytest.mark.parametrize("lengths", [MIXED, FEW], ids=["mixed", "few"])
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_no_plan_is_quicker_than_its_floor(kind: str, lengths: Array) -> None:
    topology = TOPOLOGIES[kind]
    slower = replace(COSTS, inside=COSTS.inside / 8, between=COSTS.between / 8, nic=COSTS.nic / 8)
    share = []
    for costs in (COSTS, slower):
        for owners, made in searched(lengths, topology, costs, without_floor=True)[1]:
            floor = least_seconds(owners, lengths, topology, costs)
            share.append(floor / planning._in_waves(made, costs, np.inf)[1])
    assert max(share) * planning._ROUNDED <= 1
    assert max(share) > 0.9


@pytest.mark.parametrize("lengths", [MIXED, FEW], ids=["mixed", "few"])
def test_floors_leave_out_placings_and_change_no_plan(lengths: Array) -> None:
    topology = TOPOLOGIES["four nodes"]
    quick, some = searched(lengths, topology, COSTS)
    slow, every = searched(lengths, topology, COSTS, without_floor=True)
    assert len(some) < 0.8 * len(every)
    assert price(quick, COSTS).seconds == price(slow, COSTS).seconds
    np.testing.assert_array_equal(quick.attention.rank, slow.attention.rank)
