"""Experts under the engine: Muon takes each matrix of a stack, and the choice's bias is saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel import World, distribute
from tests.streams import streams
from train.config import ZeroConfig
from train.engine import Engine
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.optimiser.muon import orthogonal
from train.optimiser.optim import OptimConfig

VOCABULARY = 61
OPTIM = OptimConfig(name="muon", lr=1e-2, warmup_steps=0)
MODEL = ModelConfig(
    pattern=["gla"], layers=1, dim=24, mixers={"gla": {"heads": 2, "head_dim": 8}},
    mlp_pattern=["experts"],
    mlps={"experts": {"experts": 5, "chosen": 2, "dim": 10, "router": "sigmoid", "bias": True}},
)  # fmt: skip
BIAS = "blocks.0.mlp.router.choice_bias"


def test_an_update_of_a_stack_is_that_of_each_matrix() -> None:
    stack = torch.randn(4, 12, 7)
    for one, alone in zip(orthogonal(stack), stack, strict=True):
        torch.testing.assert_close(one, orthogonal(alone), rtol=0, atol=1e-5)


def trained(world: World, stage: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is saved after a step, by name."""
    torch.manual_seed(0)
    net = Model(MODEL, VOCABULARY)
    net.get_buffer(BIAS).copy_(torch.linspace(0, 1e-3, 5))
    engine = Engine(net, OPTIM, ZeroConfig(stage=stage), world, dtype, 1)
    (batch,) = streams([[40, 3, 21]], VOCABULARY)
    loss, _ = engine(*distribute(*batch, world))
    engine.backward(loss * (world.size / int((batch.labels >= 0).sum())))
    engine.step(1e-2)
    return {name: full.clone() for name, key, full in engine.gather() if key == "weight"}


@pytest.mark.parametrize(("size", "stage"), [(3, 1), (2, 2), (3, 3)])
def test_muon_steps_each_experts_matrix_whoever_holds_it(ranks, size: int, stage: int) -> None:
    """fp32, to 1e-4: as a fifth power is taken five times."""
    (wanted,) = ranks(1).run(trained, 0, torch.float32)
    for got in ranks(size).run(trained, stage, torch.float32):
        assert got.keys() == wanted.keys()
        for name, one in wanted.items():
            torch.testing.assert_close(got[name], one, rtol=0, atol=1e-4, msg=name)


def test_the_bias_on_the_choice_stays_fp32_and_is_saved(ranks) -> None:
    (saved,) = ranks(1).run(trained, 1, torch.bfloat16)
    moved = (saved[BIAS] - torch.linspace(0, 1e-3, 5)) / 1e-3  # a step of the rate, or none
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-4)
    assert moved.abs().max() == pytest.approx(1, abs=1e-4)
