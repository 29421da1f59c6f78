"""The planner is told what a model's layers are like."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch

from parallel import ParallelConfig, World
from parallel.planning.costs import States
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.planning import planner_of

HEADS: dict[str, Any] = {"heads": 2, "value_heads": 4, "head_dim": 16, "value_head_dim": 32}
DIM = 64


def states_of(pattern: list[str]) -> States | None:
    given = {
        "gated_deltanet": HEADS,
        "gla": HEADS,
        "hgrn": {},
        "window": {"kind": "attention", "heads": 4, "window": 8},
        "attention": {"heads": 4},
    }
    config = ModelConfig(
        dim=DIM,
        layers=len(pattern),
        pattern=pattern,
        mixers={name: given[name] for name in set(pattern)},
    )
    model = Model(config, 32)
    world = World(0, 1, 0, torch.device("cpu"))
    with closing(planner_of(model, ParallelConfig(), world, torch.bfloat16)) as planner:
        return planner.costs.states


def test_the_rest_of_the_work_is_all_but_attention() -> None:
    config = ModelConfig(
        dim=DIM,
        layers=4,
        pattern=["gated_deltanet", "attention"],
        mixers={"gated_deltanet": HEADS, "attention": {"heads": 4}},
    )
    model, world = Model(config, 32), World(0, 1, 0, torch.device("cpu"))
    with closing(planner_of(model, ParallelConfig(), world, torch.bfloat16)) as planner:
        costs = planner.costs
    attention = sum(model.blocks[i].mixer.mixing_flops([1]) for i in (1, 3))
    assert costs.rest * costs.flops * 2 == pytest.approx(model.flops([1]) - attention)


def test_of_the_delta_rule() -> None:
    """Three layers for one of attention; M is a matrix; the gate is projected meanwhile."""
    states = states_of(["gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"])
    assert states is not None
    assert (states.layers, states.heads) == (3, 4)
    assert (states.M_bytes, states.E_bytes) == (4 * 16 * 16, 4 * 16 * 32)
    assert states.beside_flops == 2 * DIM * (4 * 32)
    assert states.map_flops > 4 * 4 * 16 * 32


def test_of_a_decay_alone() -> None:
    """M is a diagonal."""
    states = states_of(["gla", "attention"])
    assert states is not None
    assert (states.layers, states.M_bytes) == (1, 4 * 16)


@pytest.mark.parametrize("pattern", [["attention"], ["hgrn", "attention"], ["window", "attention"]])
def test_of_layers_without_large_states(pattern: list[str]) -> None:
    assert states_of(pattern) is None
