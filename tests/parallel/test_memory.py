"""What a rank keeps for the backward pass is its share of the tokens, wherever they lie."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel import ParallelConfig, World, distribute
from parallel.chain import Passage
from parallel.config import Attention
from parallel.exchange import Journey
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.planning import planner_of

RANKS, VOCABULARY = 4, 61
CONFIG = ModelConfig(
    pattern=["gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"],
    layers=4,
    dim=64,
    mixers={
        "gated_deltanet": {"heads": 2, "value_heads": 4, "head_dim": 16},
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16},
    },
)
STREAMS = [[4096], [1500, 900, 700, 500, 200, 100, 100, 60, 30, 6], [128] * 32]


def step(
    world: World, strategy: Attention, lengths: list[int]
) -> tuple[Model, Callable[[], Tensor]]:
    """A model, and a function for its loss of one batch."""
    torch.manual_seed(0)
    model = Model(CONFIG, VOCABULARY)
    config = ParallelConfig(strategy)
    planner = planner_of(model, config, world, torch.float32)
    count = np.arange(sum(lengths))
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    shard = distribute(count % VOCABULARY, count % VOCABULARY, cu_seqlens, world, planner=planner)
    planner.close()
    return model, lambda: model(*shard)[0]


def kept(world: World, strategy: Attention, lengths: list[int]) -> int:
    """Bytes of all tensors that the forward pass of a model keeps, parameters left out."""
    model, loss = step(world, strategy, lengths)
    storages: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    alive = []

    def keep(x: Tensor) -> Tensor:
        alive.append(x)  # so that no storage is counted for two
        storages.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = loss()
    result.backward()
    return sum(storages.values())


@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize("strategy", ["balanced", "ring", "ulysses"])
def test_a_rank_keeps_its_share(ranks, strategy: Attention, lengths: list[int]) -> None:
    """To 15 %."""
    alone = kept(World(0, 1, 0, torch.device("cpu")), strategy, lengths)
    for found in ranks(RANKS).run(kept, strategy, lengths):
        assert found <= 1.15 * alone / RANKS


def left_after_a_step(world: World) -> tuple[int, int]:
    """Exchanges begun in a step, and those that are still there when it is over."""
    begun: list[weakref.ref[Any]] = []

    def noted(kind: type) -> Any:
        def make(self: Any, *arguments: Any) -> None:
            begun.append(weakref.ref(self))
            original(self, *arguments)

        original = kind.__init__
        return mock.patch.object(kind, "__init__", make)

    gc.disable()  # nothing may wait for it: it would be a step's activations
    try:
        with noted(Passage), noted(Journey):
            _, loss = step(world, "balanced", [256])
            loss().backward()
    finally:
        gc.enable()
    return len(begun), sum(one() is not None for one in begun)


def test_a_step_leaves_nothing_behind(ranks) -> None:
    for begun, left in ranks(RANKS).run(left_after_a_step):
        assert begun > 0
        assert left == 0
