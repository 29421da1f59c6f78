"""Experts under the engine: Muon takes each matrix of a stack, the choice's bias is saved, and what
lives at home is trained, checked and saved as what every rank has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel import World, distribute
from parallel.config import Experts
from tests.streams import streams
from train.config import ZeroConfig
from train.engine import Engine
from train.model.config import ModelConfig
from train.model.transformer import Model, skeleton
from train.optimiser.muon import orthogonal
from train.optimiser.optim import OptimConfig
from train.survival import manifest
from train.survival.checkpoint import Saver, diverged, load
from train.survival.manifest import Progress

VOCABULARY = 61
OPTIM = OptimConfig(name="muon", lr=1e-2, warmup_steps=0)
MODEL = ModelConfig(
    pattern=["gla"], layers=1, dim=24, mixers={"gla": {"heads": 2, "head_dim": 8}},
    mlp_pattern=["experts"],
    mlps={"experts": {"experts": 5, "chosen": 2, "dim": 10, "router": "sigmoid", "bias": True}},
)  # fmt: skip
BIAS = "blocks.0.mlp.router.choice_bias"
# What travels: to whose experts it is rows.
BY: dict[Experts, dict[str, bool]] = {"weights": {}, "rows": {"blocks.0.mlp": False}}
# Fewer experts than ranks: they have replicas.
PAIR = dataclasses.replace(MODEL, mlps={"experts": {"experts": 2, "chosen": 1, "dim": 10}})


def test_an_update_of_a_stack_is_that_of_each_matrix() -> None:
    stack = torch.randn(4, 12, 7)
    for one, alone in zip(orthogonal(stack), stack, strict=True):
        torch.testing.assert_close(one, orthogonal(alone), rtol=0, atol=1e-5)


def trained(
    world: World,
    stage: int,
    dtype: torch.dtype,
    travel: Experts = "weights",
    config: ModelConfig = MODEL,
) -> dict[str, Tensor]:
    """What is saved after a step, by name."""
    torch.manual_seed(0)
    net = Model(config, VOCABULARY)
    if config is MODEL:
        net.get_buffer(BIAS).copy_(torch.linspace(0, 1e-3, 5))
    engine = Engine(net, OPTIM, ZeroConfig(stage=stage), world, dtype, 1, BY[travel])
    (batch,) = streams([[40, 3, 21]], VOCABULARY)
    loss, _ = engine(*distribute(*batch, world))
    engine.backward(loss * (world.size / int((batch.labels >= 0).sum())))
    engine.step(1e-2)
    return {name: full.clone() for name, key, full in engine.gather() if key == "weight"}


@pytest.mark.parametrize(
    ("size", "stage", "travel", "config"),
    [
        (3, 1, "weights", MODEL),
        (2, 2, "weights", MODEL),
        (3, 3, "weights", MODEL),
        (2, 3, "rows", MODEL),
        (3, 1, "rows", MODEL),
        (3, 2, "rows", PAIR),
    ],
)
def test_muon_steps_each_experts_matrix_whoever_holds_it(
    ranks, size: int, stage: int, travel: Experts, config: ModelConfig
) -> None:
    """fp32, to 1e-4: as a fifth power is taken five times."""
    (wanted,) = ranks(1).run(trained, 0, torch.float32, "weights", config)
    for got in ranks(size).run(trained, stage, torch.float32, travel, config):
        assert got.keys() == wanted.keys()
        for name, one in wanted.items():
            torch.testing.assert_close(got[name], one, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("config", [MODEL, PAIR])
def test_experts_at_home_keep_fp32_weights_in_bf16(ranks, config: ModelConfig) -> None:
    """A step of Muon changes a number by 0.002: to 0.0005 of one in fp32, in the mean."""
    (wanted,) = ranks(1).run(trained, 0, torch.float32, "weights", config)
    for got in ranks(3).run(trained, 2, torch.bfloat16, "rows", config):
        for part in ("up", "out"):
            one = got[f"blocks.0.mlp.{part}.weight"]
            assert one.dtype == torch.float32
            assert not torch.equal(one, one.bfloat16().float())
            assert (one - wanted[f"blocks.0.mlp.{part}.weight"]).abs().mean() < 5e-4


def test_the_bias_on_the_choice_stays_fp32_and_is_saved(ranks) -> None:
    (saved,) = ranks(1).run(trained, 1, torch.bfloat16)
    moved = (saved[BIAS] - torch.linspace(0, 1e-3, 5)) / 1e-3  # a step of the rate, or none
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-4)
    assert moved.abs().max() == pytest.approx(1, abs=1e-4)


def held(world: World, config: ModelConfig, stage: int) -> tuple[set[str], int, dict[str, Tensor]]:
    """Which parameters a rank has, how many numbers of experts' matrices, and all it began with."""
    engine = Engine(
        skeleton(config, VOCABULARY),
        OPTIM,
        ZeroConfig(stage=stage),
        world,
        torch.float32,
        1,
        BY["rows"],
    )
    engine.begin(3)
    numbers = sum(stack.weight.numel() for stack in engine.at_home.stacks.values())
    names = {name for name, _ in engine.model.named_parameters()}
    return names, numbers, {name: x.clone() for name, key, x in engine.gather() if key == "weight"}


@pytest.mark.parametrize(("config", "stage"), [(MODEL, 3), (PAIR, 0)])
def test_a_rank_has_the_matrices_of_its_own_experts_alone(
    ranks, config: ModelConfig, stage: int
) -> None:
    """And what it begins with is what one process does."""
    whole = Model(config, VOCABULARY, seed=3)
    experts = config.mlps["experts"]["experts"]
    each = sum(p.numel() for n, p in whole.named_parameters() if p.dim() == 3) // experts
    results = ranks(3).run(held, config, stage)
    assert [numbers for _, numbers, _ in results] == [
        each * ((rank + 1) * experts // 3 - rank * experts // 3 or 1) for rank in range(3)
    ]
    for names, _, began in results:
        assert not {name for name in names if name.endswith(("mlp.up.weight", "mlp.out.weight"))}
        for name, one in whole.named_parameters():
            assert torch.equal(began[name], one), name


def parted(world: World) -> tuple[str | None, str | None]:
    """What is said of copies, before and after rank 1 changes a bit of an expert."""
    engine = Engine(
        skeleton(PAIR, VOCABULARY), OPTIM, ZeroConfig(stage=3), world, torch.float32, 1, BY["rows"]
    )
    engine.begin(3)
    before = diverged(engine, world)
    if world.rank == 1:
        weight = engine.at_home.stacks["blocks.0.mlp.up.weight"].weight
        weight.data.view(torch.int32).flatten()[0] ^= 1
    return before, diverged(engine, world)


def test_replicas_that_part_are_named(ranks) -> None:
    """Of three ranks the first two have the first of two experts."""
    for before, after in ranks(3).run(parted):
        assert before is None
        assert after is not None
        assert after.startswith("blocks.0.mlp.up.weight is not the same on every rank")


def refused(world: World, stage: int) -> tuple[dict[str, bool], list[float]]:
    """What a step that is not good leaves as it was, and the norms of three steps on one batch."""
    adamw = OptimConfig(lr=1e-2, warmup_steps=0, clip=0.1)
    engine = Engine(
        skeleton(PAIR, VOCABULARY),
        adamw,
        ZeroConfig(stage=stage),
        world,
        torch.float32,
        1,
        BY["rows"],
    )
    engine.begin(3)
    (batch,) = streams([[40, 3, 21]], VOCABULARY)
    before = {(name, key): full.clone() for name, key, full in engine.gather()}
    norms, kept = [], {}
    for good in (False, True, True):
        loss, _ = engine(*distribute(*batch, world))
        engine.backward(loss * (world.size / int((batch.labels >= 0).sum())))
        norms.append(engine.step(1e-2, lambda norm, good=good: good))
        if not good:
            kept = {
                name: torch.equal(full, before[name, key]) for name, key, full in engine.gather()
            }
    return kept, norms


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_that_is_not_good_changes_no_expert(ranks, stage: int) -> None:
    """And leaves no gradient behind: the same batch has the same norm again, and then another."""
    for kept, (first, again, after) in ranks(3).run(refused, stage):
        assert all(kept.values())
        assert first == again != after


def means(world: World, travel: Experts, stage: int) -> dict[str, Tensor]:
    """The mean gradients after a step that is clipped to a norm of 0.01."""
    adamw = OptimConfig(lr=1e-2, warmup_steps=0, clip=0.01)
    engine = Engine(
        skeleton(PAIR, VOCABULARY), adamw, ZeroConfig(stage=stage), world, torch.float32, 1,
        BY[travel],
    )  # fmt: skip
    engine.begin(3)
    (batch,) = streams([[40, 3, 21]], VOCABULARY)
    loss, _ = engine(*distribute(*batch, world))
    engine.backward(loss * (world.size / int((batch.labels >= 0).sum())))
    assert engine.step(1e-2) > 0.1
    return {name: full.clone() for name, key, full in engine.gather() if key == "exp_avg"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_gradients_are_clipped_by_one_norm(ranks, stage: int) -> None:
    """Their norm is 0.01 then, of which the mean has a tenth, to 1e-4; each one's to 1e-5 of it."""
    (wanted,) = ranks(1).run(means, "weights", 0)
    norm = sum(float(one.square().sum()) for one in wanted.values()) ** 0.5
    assert norm == pytest.approx(0.001, rel=1e-4)
    for got in ranks(3).run(means, "rows", stage):
        assert got.keys() == wanted.keys()
        for name, one in wanted.items():
            torch.testing.assert_close(got[name], one, rtol=0, atol=1e-5 * norm, msg=name)


Leg = tuple[list[float], dict[str, Tensor]]


def leg(
    world: World, config: ModelConfig, kind: tuple[int, Experts], path: Path | None, folder: Path,
    first: int,
) -> Leg:  # fmt: skip
    """Two steps from a checkpoint on, and a save: losses, and the state it began with."""
    stage, travel = kind
    adamw = OptimConfig(lr=1e-2, warmup_steps=0)
    engine = Engine(
        skeleton(config, VOCABULARY), adamw, ZeroConfig(stage=stage), world, torch.float32, 1,
        BY[travel],
    )  # fmt: skip
    if path is None:
        engine.begin(1)
    else:
        load(path, engine)
    began = {f"{name}|{key}": full.clone() for name, key, full in engine.gather()}
    losses = []
    for batch in streams([[50, 14], [9, 1, 30], [64], [3] * 12], VOCABULARY)[first : first + 2]:
        targets = int((batch.labels >= 0).sum())
        loss, nats = engine(*distribute(*batch, world))
        engine.backward(loss * (world.size / targets))
        engine.step(1e-2)
        losses.append(float(world.sum(nats.double())) / targets)
    saver = Saver(folder, world)
    saver.start(engine, Progress(first + 2, 0, {}, "", {}))
    saved = saver.finish()
    assert saved is not None
    assert saved.error is None
    return losses, began


@pytest.mark.parametrize("config", [MODEL, PAIR])
def test_a_run_goes_on_with_other_ranks_and_either_way(
    ranks, tmp_path: Path, config: ModelConfig
) -> None:
    """4 → 3 → 1 ranks, and from rows to weights and back: the same state to the last bit at each
    change, and the losses of one rank that never stopped, to 2e-5."""
    wanted: list[float] = []
    path = None
    for first in (0, 2):
        losses, _ = ranks(1).run(leg, config, (0, "rows"), path, tmp_path / "whole", first)[0]
        wanted, path = wanted + losses, tmp_path / "whole" / manifest.name(first + 2)
    courses = [
        [(4, 2, "rows"), (3, 3, "weights")],
        [(3, 1, "weights"), (4, 3, "rows")],
        [(3, 0, "rows"), (1, 1, "rows")],
    ]
    for number, course in enumerate(courses):
        got: list[float] = []
        path = None
        for first, (size, stage, travel) in zip((0, 2), course, strict=True):
            folder = tmp_path / f"course {number}"
            losses, began = ranks(size).run(leg, config, (stage, travel), path, folder, first)[0]
            if path:
                saved = {k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}
                assert began.keys() == saved.keys()
                assert all(torch.equal(began[name], saved[name]) for name in saved)
            got, path = got + losses, folder / manifest.name(first + 2)
        np.testing.assert_allclose(got, wanted, rtol=2e-5)
