"""Alternatives in groups of ranks are at their best form, and cost what a count by hand says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parallel.planning.building import build
from parallel.planning.clusters import load_cluster
from parallel.planning.costs import Costs, States
from parallel.planning.layout import Topology
from parallel.planning.owners import Owners
from parallel.planning.passes import Passes
from parallel.simulation import published
from parallel.simulation.case import Case, lower_bound
from parallel.simulation.groups import (
    best,
    by_time,
    exchanged_heads,
    forms,
    gathered,
    packed,
    shared,
    sizes,
)
from parallel.simulation.models import MODELS
from parallel.simulation.strategies import strategies

README = Path(__file__).parents[3] / "README.md"


def a_case(lengths: list[int], gpus: int = 16, model: str = "hybrid-7b", each: int = 8) -> Case:
    topology = Topology(gpus, min(each, gpus))
    return Case(np.array(lengths), topology, load_cluster("h800"), MODELS[model])


@pytest.mark.parametrize(("size", "each", "heads"), [(1, 8, 32), (8, 8, 4), (32, 8, 32), (6, 4, 6)])
def test_forms_divide_a_group_into_seats_and_slices(size: int, each: int, heads: int) -> None:
    found = dict(forms(size, Topology(96, each), heads))
    assert len(found) == len(set(found.values()))
    for rows, seats, slices in found.values():
        assert rows * seats * slices == size
        assert slices <= heads
        assert rows == 1 or seats * slices == each
    assert "ring" in found
    assert ("all-to-all" in found) == (1 < size <= heads and size & (size - 1) == 0)
    assert ("double ring" in found) == (size > each and size % each == 0)


@pytest.mark.parametrize("model", ["llama-8b-gqa", "hybrid-3b"])
def test_the_best_grid_is_the_quickest_of_all_grids(model: str) -> None:
    """Every size and form, without the bound by which some are passed over."""
    case = a_case([15000, 4000, 3500, 2500, 1500, *[500] * 8], 8, model, each=4)
    every = [
        shared(case, packed(case, size)[0], size, shape).seconds
        for size in sizes(case)
        for _, shape in forms(size, case.topology, case.model.heads)
    ]
    assert len(every) > 4
    assert best(case).seconds == pytest.approx(min(every))
    ulysses = best(case, lambda form: form == "all-to-all")
    assert ulysses.seconds >= best(case).seconds
    assert "all-to-all" in ulysses.form


@pytest.mark.parametrize("model", ["llama-7b", "hybrid-7b"])
def test_equal_documents_meet_the_bound_under_every_alternative_in_groups(model: str) -> None:
    case = a_case([4096] * 16, 16, model)
    for name, step in strategies(case.model).items():
        if name not in ("even", "zeppelin"):
            outcome = step(case)
            assert outcome.seconds == pytest.approx(lower_bound(case)), name
            assert (outcome.inside, outcome.between) == (0, 0), name


def test_groups_sized_by_time_beat_those_sized_by_memory_where_work_is_uneven() -> None:
    """One document of six shards: memory asks for eight ranks, time for all."""
    case = a_case([24000, *[1024] * 40], 16, "llama-7b")
    assert 24000 / 8 <= case.room < 24000 / 4
    found = by_time(case, "ring")
    group = np.array([0] + [1] * 40)  # as memory alone has it: eight ranks for the long one
    assert found.seconds < 0.9 * shared(case, group, 8, (1, 8, 1)).seconds


def test_what_is_gathered_is_counted() -> None:
    """Two nodes: each rank gets all keys but its own, forward, and twice as much backward."""
    case = a_case([16384], 16, "llama-7b")
    outcome = gathered(case)
    kv = 2 * 2 * 32 * 128  # bytes of a token's keys and values
    layers = case.model.layers
    assert outcome.inside + outcome.between == pytest.approx(3 * layers * 16384 * kv * 15)
    assert outcome.between == pytest.approx(3 * layers * 16384 * kv)


def test_exchanged_heads_are_counted() -> None:
    """Four ranks on two nodes: each sends three quarters of its q, k, v and o, both ways."""
    states = States(1, 8, 0.0, 0.0, passes=Passes(0, 0), beside=0.0)
    costs = Costs(q_bytes=2 * 8 * 64, heads=8, kv_heads=8, states=states)
    owners = Owners(np.array([-1]), [np.arange(4).reshape(1, 4, 1)], "rank")
    made = build("groups", np.array([4000]), owners, Topology(4, 2), by_node=False)
    found = exchanged_heads(made, costs)
    assert found is not None
    seconds, traffic = found
    each = 2 * 4 * 1000 * 2 * 8 * 64 / 4  # to one other rank, forward and backward
    np.testing.assert_allclose(traffic.inside, each)
    np.testing.assert_allclose(traffic.between, 2 * each)
    rate = costs.between / 2  # of a rank
    assert seconds == pytest.approx(max(each / costs.inside, 2 * each / rate) + 8e-5)
    assert exchanged_heads(made, replace(costs, states=replace(states, heads=6))) is None


def test_readme_has_every_published_ratio_and_says_why_where_it_is_far_off() -> None:
    text = README.read_text(encoding="utf-8")
    for row in published.ROWS:
        line = re.search(
            rf"^\| {re.escape(row.what)} \| {re.escape(row.source)} "
            rf"\| {row.published:.2f} × \| ([\d.]+) × \| ([+-]\d+)% \|$",
            text,
            flags=re.MULTILINE,
        )
        assert line, row.what
        assert round(100 * (float(line[1]) / row.published - 1)) == pytest.approx(
            int(line[2]), abs=1
        )
        if abs(int(line[2])) > 25:
            assert row.why, row.what
        assert row.why in text


def test_a_published_ratio_is_that_of_two_steps() -> None:
    row = published.ROWS[3]
    (case,) = published.cases(row.settings[0], 1)
    steps = [step(case, row.settings[0]).seconds for step in (row.slower, row.quicker)]
    assert row.simulated(1) == pytest.approx(steps[0] / steps[1])
    assert steps[0] > steps[1]
