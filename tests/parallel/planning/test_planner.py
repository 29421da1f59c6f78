"""Plans are made in the background, once each, and from the sizes of the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from parallel import FullAttention, ParallelConfig, Planner
from parallel.planning.clusters import Work
from parallel.planning.layout import Plan, Topology
from parallel.planning.plan import plan
from parallel.planning.planner import with_speeds

LENGTHS = np.array([9000, 500, 4000, 3000, 20])
WHERE = Topology(8, 4)
MODEL = FullAttention(heads=32, kv_heads=8, head_dim=128)


@pytest.fixture
def planner() -> Iterator[Planner]:
    with closing(Planner(ParallelConfig(), WHERE, MODEL)) as made:
        yield made


def same(one: Plan, two: Plan) -> bool:
    return (
        np.array_equal(one.stream.offset, two.stream.offset)
        and all(np.array_equal(a.ranks, b.ranks) for a, b in zip(one.rings, two.rings, strict=True))
        and np.array_equal(one.to_attention.target_offset, two.to_attention.target_offset)
    )


def test_a_batch_that_was_begun_is_planned_once_and_in_the_background(planner: Planner) -> None:
    threads = []

    def watched(*arguments: object, **more: object) -> Plan:
        threads.append(threading.current_thread())
        return plan(*arguments, **more)  # type: ignore[arg-type]

    with mock.patch("parallel.planning.planner.plan", watched):
        planner.begin(LENGTHS)
        first = planner.plan(LENGTHS)
        assert planner.plan(LENGTHS.astype(np.int32)) is first
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_ranks_that_plan_apart_plan_alike(planner: Planner) -> None:
    with closing(Planner(ParallelConfig(), WHERE, MODEL)) as other:
        other.begin(np.array([7, 7, 7]))
        other.begin(LENGTHS)
        assert same(planner.plan(LENGTHS), other.plan(LENGTHS))


def test_a_fault_of_planning_is_raised_where_the_plan_is_wanted(planner: Planner) -> None:
    planner.begin(np.array([5, -1]))
    with pytest.raises(ValueError, match="-1"):
        planner.plan(np.array([5, -1]))


def test_heads_are_split_no_further_than_there_are_heads() -> None:
    for heads in (1, 2, 6):
        model = FullAttention(heads=heads, kv_heads=1, head_dim=64)
        with closing(Planner(ParallelConfig(), WHERE, model)) as planner:
            made = planner.plan(np.array([60000]))
            assert all(ring.slices <= heads for ring in made.rings)


def test_a_model_of_full_attention_alone_moves_fewer_tokens(planner: Planner) -> None:
    alone = FullAttention(heads=1, kv_heads=1, head_dim=128, alone=True)
    with closing(Planner(ParallelConfig(), WHERE, alone)) as other:
        moved = [
            made.to_attention.tokens[made.to_attention.source != made.to_attention.target].sum()
            for made in (other.plan(LENGTHS), planner.plan(LENGTHS))
        ]
    assert moved[0] < moved[1]


def test_routing_is_a_setting() -> None:
    nodes = []
    for routing in (True, False):
        with closing(Planner(ParallelConfig(routing=routing), WHERE)) as planner:
            nodes.append(len(planner.plan(np.array([60000])).rings[0].ranks))
    assert nodes == [WHERE.nodes, 1]  # a flat ring knows no nodes


@pytest.mark.parametrize("device", ["", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A800"])
def test_any_device_has_a_price(device: str) -> None:
    with closing(Planner(ParallelConfig(), WHERE, MODEL, device)) as planner:
        assert planner.plan(LENGTHS).stream.tokens.sum() == LENGTHS.sum()


def test_a_slow_rank_gets_less_work() -> None:
    """All that a rank at half speed computes takes about as long as elsewhere."""
    lengths = np.full(64, 500)
    model = replace(MODEL, work=Work(products=1e9))
    with closing(Planner(ParallelConfig(speeds={5: 0.5}), WHERE, model)) as planner:
        made = planner.plan(lengths)
    shares = made.stream.tokens / made.stream.tokens.sum()
    assert shares[5] == pytest.approx(0.5 / 7.5, abs=0.02)
    assert np.delete(shares, 5).max() < 1.08 / 7.5


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ({8: 0.5}, "names rank 8; it must be one of 0 to 7"),
        ({-1: 0.5}, "names rank -1; it must be one of 0 to 7"),
        ({1: 0}, r"\[1\] is 0; it must be a number from 0.01 to 1"),
        ({1: 1.5}, r"\[1\] is 1.5; it must be"),
        ({1: float("nan")}, r"\[1\] is nan; it must be"),
    ],
)
def test_a_wrong_speed_is_refused_by_value(speeds: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"parallel.speeds.*{said}"):
        with_speeds(WHERE, speeds)
