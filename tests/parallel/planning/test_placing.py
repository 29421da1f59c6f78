"""Placings of one batch share their work, and come out as if each were alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from unittest import mock

import numpy as np
import pytest

from parallel.planning import placing
from parallel.planning.clusters import load_cluster
from parallel.planning.layout import Topology
from parallel.planning.placing import Limits, balanced
from parallel.planning.prices import Prices

LENGTHS = np.array([60000, 21000, 20000, 9000, 7000, 7000, 5000, 3000, 1000, 500] * 3)
# Each value with each other: whatever a field decides alone is met in placings that are else alike.
LIMITS = [
    Limits(level, 1.15, slices, slack, 1, uneven)
    for level, slices, slack, uneven in product(
        (1.0, 1.02, 2.0), (0.03, 0.1, 0.5, 1.0), (0.05, 0.15, 0.6), (False, True)
    )
]


@pytest.mark.parametrize(
    "topology", [Topology(16, 8), Topology(29, 8, (7, 8, 8, 6)), Topology(16, 4)], ids=str
)
def test_a_placing_is_the_same_after_others(topology: Topology) -> None:
    costs = replace(load_cluster("h800").costs(32, 8, 128, 4096), rest=1e-7, layers=8)
    together = Prices(LENGTHS, topology, costs, False)
    whole = placing._Placing.inside_nodes
    with mock.patch.object(
        placing._Placing, "inside_nodes", autospec=True, side_effect=whole
    ) as inside:
        shared = [balanced(together.with_slices(x.slices), x) for x in LIMITS]
        made = inside.call_count
        inside.reset_mock()
        apart = [
            balanced(Prices(LENGTHS, topology, costs, False).with_slices(x.slices), x)
            for x in LIMITS
        ]
    assert [x.key for x in shared] == [x.key for x in apart]
    assert made < inside.call_count
