"""Linear layers over a cut stream: output and every gradient as on one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
import parallel
from parallel import ParallelConfig, Shard, World, distribute
from parallel.config import Attention
from parallel.planning import passing
from parallel.travel.exchange import sent_bytes
from parallel.travel.states import OneWay
from tests.parallel.across import STREAMS, difference, noting
from train.model.config import ModelConfig
from train.model.linear import _Rows
from train.model.mixers import make
from train.model.mixers._parts import Later

# Every row of the recurrence's table.
ROWS = {
    "linear attention": (None, False),
    "retnet": ("head", False),
    "mamba2": ("scalar", False),
    "gla": ("vector", False),
    "deltanet": (None, True),
    "gated deltanet": ("scalar", True),
    "kda": ("vector", True),
}
HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 6, 5


# Ranks, ranks a node, and who decides where the stream lies: rings leave each of their nodes an
# early and a late run of a sequence.
PLACES: list[tuple[int, int, Attention]] = [
    (1, 1, "balanced"),
    (2, 1, "ring"),
    (2, 2, "balanced"),
    (3, 2, "ring"),
    (3, 3, "allgather"),
    (4, 1, "ring"),
    (4, 2, "ring"),
    (4, 2, "balanced"),
    (4, 4, "ring"),
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(
        1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def recurrences(
    world: World, lengths: list[int], each: int, attention: Attention
) -> dict[str, float]:
    """The error of each recurrence of the table."""
    world = dataclasses.replace(world, ranks_per_node=each)
    T = sum(lengths)
    errors = {}
    for row, (decay, delta) in ROWS.items():
        rows = {
            "q": random(T, HEADS, KEY_DIM, seed=1),
            "k": F.normalize(random(T, HEADS, KEY_DIM, seed=2), dim=-1),
            "v": random(T, VALUE_HEADS, VALUE_DIM, seed=3),
        }
        weights = {}
        if decay == "head":
            weights["decay"] = -0.1 * random(VALUE_HEADS, seed=4)[0].abs()
        if decay == "scalar":
            rows["decay"] = -0.1 * random(T, VALUE_HEADS, seed=4).abs()
        if decay == "vector":
            rows["decay"] = -0.1 * random(T, VALUE_HEADS, KEY_DIM, seed=4).abs()
        if delta:
            rows["beta"] = 2 * random(T, VALUE_HEADS, seed=5).sigmoid()

        def layer(x: dict[str, Tensor], shard: Shard) -> Tensor:
            given = (x["q"], x["k"], x["v"], x.get("decay"), x.get("beta"))
            return parallel.linear_attention(*given, shard)[0]

        def whole(x: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
            return kernels.linear_attention(**x, cu_seqlens=cu_seqlens, backend="reference")[0]

        config = ParallelConfig(attention)
        # By turns ranks divide the heads to compose, and one composes all of such small states.
        least = 1 if len(errors) % 2 == 0 else passing._LEAST_BYTES
        with mock.patch.object(passing, "_LEAST_BYTES", least):
            errors[row] = difference(world, lengths, rows, weights, layer, whole, config)
    return errors


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize(("size", "each", "attention"), PLACES)
def test_every_recurrence_equals_the_definition(
    ranks, size: int, each: int, attention: Attention, lengths: list[int]
) -> None:
    """fp64: to 1e-10."""
    for errors in ranks(size).run(recurrences, lengths, each, attention):
        assert all(error < 1e-10 for error in errors.values()), errors


def scan(world: World, lengths: list[int], each: int, attention: Attention) -> float:
    world = dataclasses.replace(world, ranks_per_node=each)
    rows = {
        "x": random(sum(lengths), 9, seed=1),
        "decay": -0.2 * random(sum(lengths), 9, seed=2).abs(),
    }

    def layer(x: dict[str, Tensor], shard: Shard) -> Tensor:
        return parallel.diagonal_scan(x["x"], x["decay"], shard)[0]

    def whole(x: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
        ends, h = cu_seqlens.tolist(), []
        for t in range(sum(lengths)):
            before = torch.zeros_like(x["x"][:, 0]) if t in ends else h[-1]
            h.append(x["decay"][:, t].exp() * before + x["x"][:, t])
        return torch.stack(h, dim=1)

    with mock.patch.object(passing, "_LEAST_BYTES", 1):
        return difference(world, lengths, rows, {}, layer, whole, ParallelConfig(attention))


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize(("size", "each", "attention"), PLACES[1::2])
def test_the_diagonal_scan_equals_its_equation(
    ranks, size: int, each: int, attention: Attention, lengths: list[int]
) -> None:
    """fp64: to 1e-10."""
    assert max(ranks(size).run(scan, lengths, each, attention)) < 1e-10


def convolution(
    world: World, lengths: list[int], width: int, each: int, attention: Attention
) -> float:
    world = dataclasses.replace(world, ranks_per_node=each)
    rows = {"x": random(sum(lengths), 7, seed=1)}
    weights = {"weight": random(7, width, seed=2)[0], "bias": random(7, seed=3)[0]}

    def layer(x: dict[str, Tensor], shard: Shard) -> Tensor:
        return parallel.short_convolution(x["x"], x["weight"], shard, bias=x["bias"])[0]

    def whole(x: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
        pieces = x["x"][0].split(cu_seqlens.diff().tolist())
        padded = [F.pad(piece.T, (width - 1, 0)) for piece in pieces]
        y = [
            F.conv1d(p, x["weight"].unsqueeze(1), x["bias"], groups=7).T
            for p in padded
            if p.shape[1] >= width
        ]
        return F.silu(torch.cat(y)).unsqueeze(0)

    return difference(world, lengths, rows, weights, layer, whole, ParallelConfig(attention))


@pytest.mark.parametrize("width", [1, 4, 9])
@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize(("size", "each", "attention"), PLACES[1::2])
def test_the_convolution_reaches_over_several_ranks(
    ranks, size: int, each: int, attention: Attention, lengths: list[int], width: int
) -> None:
    """fp64: to 1e-10; shards of one token under a filter of nine take from eight ranks."""
    assert max(ranks(size).run(convolution, lengths, width, each, attention)) < 1e-10


def sent_by_the_delta_rule(world: World, length: int) -> int:
    """Bytes that this rank sends for one forward and backward of a sequence over all ranks."""
    count = np.arange(length)
    _, _, shard = distribute(count, count, np.array([0, length]), world)
    q, v = (torch.randn(1, shard.tokens, 2, dim, requires_grad=True) for dim in (6, 5))
    beta = torch.rand(1, shard.tokens, 2)
    before = sum(sent_bytes.values())
    parallel.linear_attention(q, F.normalize(q, dim=-1), v, None, beta, shard)[0].sum().backward()
    return sum(sent_bytes.values()) - before


@pytest.mark.parametrize("length", [40, 400])
def test_linear_layers_send_only_states(ranks, length: int) -> None:
    """Of four ranks, rank 1 composes both heads, from rank 0's E and the maps of ranks 1 and 2.

    It is told E by rank 0 and E and M by rank 2, and tells ranks 2 and 3 their states: of 2 heads
    in fp32 that is 4 E and an M forward, and as much back, whatever the length.
    """
    E, M = 2 * 6 * 5 * 4, 2 * 6 * 6 * 4
    assert sum(ranks(4).run(sent_by_the_delta_rule, length)) == 2 * (4 * E + M)


def calls_of_a_layer(world: World) -> list[str]:
    """The calls of one gated layer while states travel, forward and backward, in order."""
    told: list[str] = []
    turn, world = OneWay._turn, dataclasses.replace(world, ranks_per_node=1)

    def noted_turn(way: OneWay) -> Callable[[], dict]:
        told.append("turn")
        arrived = turn(way)

        def noted() -> dict:
            told.append("arrives")
            return arrived()

        return noted

    settings = {"gated_deltanet": {"heads": 2, "head_dim": 4, "conv_size": 0}}
    config = ModelConfig(pattern=["gated_deltanet"], dim=16, mixers=settings)
    mixer = make("gated_deltanet", config, 0)
    count = np.arange(48)
    _, _, shard = distribute(count, count, np.array([0, 29, 48]), world, ParallelConfig())
    x = torch.randn(1, shard.tokens, 16, requires_grad=True)
    with (
        mock.patch.object(OneWay, "_turn", noted_turn),
        noting(told, Later, "__call__", "piece"),
        noting(told, _Rows, "backward", "piece"),
    ):
        mixer(x, shard).sum().backward()
    return told


def test_pieces_of_the_gate_are_computed_while_states_travel(ranks) -> None:
    """One piece a turn, forward and backward."""
    assert ranks(2).run(calls_of_a_layer) == [["turn", "piece", "arrives"] * 8] * 2
