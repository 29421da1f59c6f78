"""ZeRO's traffic takes its share of the links, for every strategy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.planning.clusters import load_cluster, zero_bytes
from parallel.planning.costs import Costs
from parallel.planning.layout import Topology
from parallel.simulation.case import Case
from parallel.simulation.models import MODELS
from parallel.simulation.strategies import strategies


@pytest.mark.parametrize(
    ("stage", "accumulate", "times"),
    [(0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 3), (0, 4, 0.5), (1, 4, 0.5), (2, 4, 1.25), (3, 4, 3)],
)
def test_bytes_of_a_batch(stage: int, accumulate: int, times: float) -> None:
    """Stage 0 reduces and gathers gradients; 1 and 2 gather weights instead; 3 does so twice a
    batch. Before a step's last batch stages 0 and 1 send nothing, 2 reduces gradients."""
    assert zero_bytes(7e9, 2, stage, accumulate) == times * 14e9


def test_links_are_slower_by_the_share_of_the_step_in_which_zero_uses_them() -> None:
    """Two nodes of four: half of the weights enter each node, three quarters each rank from its
    node."""
    where, lengths = Topology(8, 4), np.array([4000] * 8)
    costs = Costs(rest=1e-6, pair=0.0, weights=1e8, inside=1e12, between=4e10, nic=1e10)
    step = 4000 * 3e-6
    found = costs.beside_zero(lengths, where)
    assert found.inside == pytest.approx(1e12 * (1 - 0.75e8 / 1e12 / step))
    assert found.between == pytest.approx(4e10 * (1 - 0.5e8 / 4e10 / step))
    assert found.nic / found.between == pytest.approx(costs.nic / costs.between)
    assert found.weights == 0
    assert replace(costs, weights=0.0).beside_zero(lengths, where).between == costs.between
    alone = costs.beside_zero(lengths, Topology(1, 4))
    assert (alone.inside, alone.between) == (costs.inside, costs.between)


def test_a_tenth_of_the_links_is_left_however_short_the_step() -> None:
    costs = Costs(weights=1e12)
    found = costs.beside_zero(np.array([8]), Topology(8, 4))
    left = found.inside / costs.inside, found.between / costs.between
    assert min(left) == pytest.approx(0.1)
    assert max(left) < 1


@pytest.mark.parametrize("model", ["llama-7b", "hybrid-7b"])
def test_no_step_is_shorter_than_zeros_traffic_and_none_gets_shorter_by_it(model: str) -> None:
    lengths = np.array([9000, 4000, 2000, 1000, 384])
    case = Case(lengths, Topology(16, 8), load_cluster("a800"), MODELS[model], zero=1)
    more = replace(case, zero=3)
    bytes_ = zero_bytes(MODELS[model].parameters, 2, 3)
    node = 4 * 25e9 * 0.85  # bytes a second of four cards
    for name, step in strategies(case.model).items():
        assert step(more).seconds >= bytes_ / 2 / node, name
        assert step(more).seconds >= 0.999 * step(case).seconds, name
