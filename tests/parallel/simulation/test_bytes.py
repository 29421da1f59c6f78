"""The simulator counts the bytes that layers really pass to gloo to send."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import parallel
from parallel import FullAttention, ParallelConfig, Planner, Shard, World, distribute
from parallel.config import Attention
from parallel.planning.clusters import load_cluster
from parallel.planning.cost import price
from parallel.planning.costs import Costs, States
from parallel.planning.layout import Plan, Topology
from parallel.planning.passes import Passes
from parallel.planning.states import price_states
from parallel.simulation.groups import shared
from parallel.simulation.models import Model
from parallel.simulation.strategies import Case
from parallel.travel.exchange import sent_bytes

RANKS, EACH = 4, 2  # on two nodes
HEADS, KV_HEADS, DIM, WORD = 4, 2, 8, 4  # fp32
TAPS = 4  # of a short convolution
MODEL = FullAttention(HEADS, KV_HEADS, DIM, WORD)
Q, KV = WORD * HEADS * DIM, 2 * WORD * KV_HEADS * DIM  # bytes of a token
STREAMS = [[640], [301, 20, 200, 3, 77, 40], [30] * 20]

Sent = tuple[float, float]  # inside nodes and between them


def attend(shard: Shard) -> Tensor:
    q, k, v = (
        torch.randn(1, shard.tokens, heads, DIM, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return parallel.softmax_attention(q, k, v, shard)


def delta_rule(shard: Shard) -> Tensor:
    q, v = (torch.randn(1, shard.tokens, HEADS, DIM, requires_grad=True) for _ in range(2))
    beta = torch.rand(1, shard.tokens, HEADS)
    return parallel.linear_attention(q, F.normalize(q, dim=-1), v, None, beta, shard)[0]


def decayed(shard: Shard) -> Tensor:
    q, v = (torch.randn(1, shard.tokens, HEADS, DIM, requires_grad=True) for _ in range(2))
    return parallel.linear_attention(q, q.detach(), v, -torch.rand_like(q), None, shard)[0]


def convolved(shard: Shard) -> Tensor:
    x = torch.randn(1, shard.tokens, HEADS * DIM, requires_grad=True)
    weight = torch.randn(HEADS * DIM, TAPS, requires_grad=True)
    return parallel.short_convolution(x, weight, shard)[0]


def sent(
    world: World,
    strategy: Attention,
    alone: bool,
    lengths: list[int],
    layer: Callable,
    routing: bool = True,
) -> tuple[Sent, Plan]:
    """Bytes that this rank sends in a layer's forward and backward pass."""
    world = dataclasses.replace(world, ranks_per_node=EACH)
    model = dataclasses.replace(MODEL, alone=alone)
    count = np.arange(sum(lengths))
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    config = ParallelConfig(strategy, routing=routing)
    with closing(Planner(config, world.topology, model)) as planner:
        _, _, shard = distribute(count, count, cu_seqlens, world, planner=planner)
    sent_bytes.clear()
    layer(shard).sum().backward()
    near = sum(n for peer, n in sent_bytes.items() if peer // EACH == world.rank // EACH)
    assert shard.view is not None
    return (near, sum(sent_bytes.values()) - near), shard.view.plan


def everywhere(found: list[tuple[Sent, Plan]]) -> Sent:
    near, far = zip(*(each for each, _ in found), strict=True)
    return sum(near), sum(far)


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize(
    ("strategy", "alone"), [("balanced", False), ("balanced", True), ("ring", False)]
)
def test_bytes_of_planned_attention(
    ranks, strategy: Attention, alone: bool, routing: bool, lengths: list[int]
) -> None:
    found = ranks(RANKS).run(sent, strategy, alone, lengths, attend, routing)
    costs = Costs(q_bytes=Q, kv_bytes=KV, heads=HEADS, kv_heads=KV_HEADS)
    traffic = price(found[0][1], costs).traffic
    assert everywhere(found) == pytest.approx((traffic.inside.sum(), traffic.between.sum()))


def a_case(lengths: list[int], full_every: int) -> Case:
    """A case for the simulator, whose activations are bf16 (half the bytes of the fp32 sent here)
    and whose states are fp32."""
    model = Model(full_every, HEADS * DIM, HEADS, KV_HEADS, 64, DIM, 64, full_every)
    return Case(np.array(lengths), Topology(RANKS, EACH), load_cluster("h800"), model)


def test_bytes_of_ulysses(ranks) -> None:
    """For a sequence that needs all ranks."""
    found = ranks(RANKS).run(sent, "ulysses", False, [640], attend)
    simulated = shared(a_case([640], 1), np.zeros(1, np.int64), RANKS, (1, 1, RANKS))
    assert sum(everywhere(found)) == pytest.approx(2 * (simulated.inside + simulated.between))


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
def test_bytes_of_all_gather(ranks, lengths: list[int]) -> None:
    """Sent are the keys and values before a rank's shard, of its first sequence, and gradients."""
    found = ranks(RANKS).run(sent, "allgather", False, lengths, attend)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    cuts = np.arange(1, RANKS) * sum(lengths) // RANKS
    begins = cu_seqlens[np.searchsorted(cu_seqlens, cuts, side="right") - 1]
    assert sum(everywhere(found)) == 2 * KV * (cuts - begins).sum()


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize(("layer", "M"), [(delta_rule, DIM * DIM), (decayed, DIM)])
def test_bytes_of_linear_layers(ranks, layer: Callable, M: int, lengths: list[int]) -> None:
    """M is a matrix with the delta rule, and a diagonal without."""
    found = ranks(RANKS).run(sent, "balanced", False, lengths, layer)
    states = States(1, HEADS, WORD * M, WORD * DIM * DIM, passes=Passes(0, 0), beside=0)
    _, traffic = price_states(found[0][1], Costs(states=states))
    assert everywhere(found) == pytest.approx((traffic.inside.sum(), traffic.between.sum()))


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
def test_bytes_of_a_convolution(ranks, lengths: list[int]) -> None:
    """The tokens before each fragment, forward, and their gradients back."""
    found = ranks(RANKS).run(sent, "balanced", False, lengths, convolved)
    halo = WORD * (TAPS - 1) * HEADS * DIM
    nothing = {"passes": Passes(0, 0), "beside": 0.0}
    with_halo, without = (
        price_states(
            found[0][1], Costs(states=States(1, HEADS, 0.0, 0.0, **nothing, halo_bytes=size))
        )
        for size in (float(halo), 0.0)
    )
    near, far = (
        getattr(with_halo[1], where).sum() - getattr(without[1], where).sum()
        for where in ("inside", "between")
    )
    assert everywhere(found) == pytest.approx((near, far))
    assert (with_halo[0] > without[0]) == bool(found[0][1].crossing)
