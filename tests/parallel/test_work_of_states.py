"""Linear layers over ranks execute the work that plans are priced by, counted in FLOPs a rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import parallel
from kernels.recurrences import LinearAttention, Packed
from kernels.tools.check import mixer_inputs
from parallel import ParallelConfig, Planner, World, distribute
from parallel.planning.costs import States
from parallel.planning.layout import Plan
from parallel.planning.passes import Passes
from parallel.planning.states import pass_seconds
from tests.kernels.test_recurrences import Products

RANKS, HEADS, DIM = 4, 2, 16
KINDS = {"mamba2": "mamba2", "gla": "gla", "gated_deltanet": "gated deltanet", "kda": "kda"}
LENGTHS = [[8192], [4096, 64, 3000, 1032], [2048] * 4]
ALONE = 1024  # tokens of the runs whose work is the price of a token


def inputs(kind: str, tokens: int) -> list[Tensor | None]:
    """q, k, v, decay and β, which want gradients."""
    made = mixer_inputs(KINDS[kind], 1, tokens, HEADS, DIM)
    return [
        made[name].float().requires_grad_() if name in made else None
        for name in ("q", "k", "v", "decay", "beta")
    ]


def flops(run: Callable[[], object]) -> float:
    with Products() as counter:
        run()
    return float(counter.flops)


def executed(world: World, lengths: list[int], kind: str) -> tuple[list[float], Plan]:
    """FLOPs of this rank's forward and backward pass, and the plan."""
    world = replace(world, ranks_per_node=RANKS)
    count, cu_seqlens = np.arange(sum(lengths)), np.concatenate([[0], np.cumsum(lengths)])
    with closing(Planner(ParallelConfig("ring"), world.topology)) as planner:
        _, _, shard = distribute(count, count, cu_seqlens, world, planner=planner)
    given, found = inputs(kind, shard.tokens), []

    def forward() -> None:
        found.append(parallel.linear_attention(*given, shard)[0])

    assert shard.view is not None
    passes = [flops(forward), flops(lambda: found[0].sum().backward())]
    return passes, shard.view.plan


def of_a_token(kind: str) -> tuple[list[float], Passes]:
    """FLOPs a token of the op's two passes, and of a middle fragment's further ones, by themselves:
    the steps of `kernels.recurrences`, called without any rank."""
    given = tuple(None if x is None else x.detach() for x in inputs(kind, ALONE))
    state, do = torch.randn(1, HEADS, DIM, DIM), torch.randn(1, ALONE, HEADS, DIM)
    recurrence, segments = LinearAttention(), Packed((ALONE,), None)
    with torch.no_grad():
        kept = recurrence.forward(given, segments, state).kept
        _, kept_late = recurrence.finish(given, segments, recurrence.begin(given, segments), state)
        forward, backward, late, gradient = (
            flops(run) / ALONE
            for run in (
                lambda: recurrence.forward(given, segments, state),
                lambda: recurrence.backward(given, segments, state, kept, do, state),
                lambda: recurrence.finish(
                    given, segments, recurrence.begin(given, segments), state
                ),
                lambda: recurrence.begin_backward(given, segments, kept_late, do),
            )
        )
    return [forward, backward], Passes(late - forward, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_do_the_work_of_their_fragments(ranks, kind: str) -> None:
    """To 5 %: composing maps is left out of the price, which does not grow with the tokens."""
    op, passes = of_a_token(kind)
    assert min(*op, *passes) > 0
    states = States(1, HEADS, 0.0, 0.0, passes=passes, beside=0.0)
    for lengths in LENGTHS:
        found = ranks(RANKS).run(executed, lengths, kind)
        plan = found[0][1]
        further = pass_seconds(plan, states) if plan.crossing else np.zeros((2, RANKS))
        wanted = np.outer(op, plan.stream.tokens) + further
        counted = np.array([passes for passes, _ in found]).T
        np.testing.assert_allclose(counted, wanted, rtol=0.05)
