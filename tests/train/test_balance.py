"""Balance of experts under the engine: over bad steps, resumes and starts from other weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from parallel import World, distribute
from tests.streams import streams
from tests.train.test_experts import BIAS, MODEL, OPTIM, VOCABULARY
from train.config import ZeroConfig
from train.engine import Engine
from train.model.transformer import Model
from train.start import begin_from
from train.survival import checkpoint
from train.survival.manifest import Progress

LOAD = "blocks.0.mlp.router.load"
# Two batches a step.
STEPS = [[[40, 3, 21], [9, 30]], [[25], [2, 2, 50]], [[7, 7, 7], [61]], [[33, 5], [1, 48]]]


def balanced(world: World, stage: int, dtype: torch.dtype) -> Engine:
    torch.manual_seed(0)
    on = MODEL.mlps["experts"] | {"aux_loss": 0.5, "sequence_loss": 0.1, "bias_rate": 0.01}
    config = dataclasses.replace(MODEL, mlps={"experts": on})
    return Engine(Model(config, VOCABULARY), OPTIM, ZeroConfig(stage=stage), world, dtype, 2)


def goes(world: World, engine: Engine, number: int, factor: float = 1.0) -> None:
    """A step; it is bad if `factor` is not finite."""
    group = streams(STEPS[number], VOCABULARY)
    targets = sum(int((batch.labels >= 0).sum()) for batch in group)
    for batch in group:
        loss, _ = engine(*distribute(*batch, world))
        engine.backward(loss * (factor * world.size * 2 / targets))
        engine.step(1e-2, math.isfinite)


def everything(engine: Engine) -> dict[tuple[str, str], Tensor]:
    return {(name, key): full.clone() for name, key, full in engine.gather()}


def with_a_bad_step(world: World, stage: int, dtype: torch.dtype) -> bool:
    """Whether a bad step between two others leaves no trace; and both move bias and load."""
    ends = []
    for bad in (False, True):
        engine = balanced(world, stage, dtype)
        goes(world, engine, 0)
        before = everything(engine)
        if bad:
            goes(world, engine, 1, math.nan)
            assert all(torch.equal(one, before[key]) for key, one in everything(engine).items())
        goes(world, engine, 2)
        ends.append(everything(engine))
        for name in (BIAS, LOAD):
            assert not torch.equal(before[name, "weight"], ends[-1][name, "weight"])
    return all(torch.equal(ends[0][key], one) for key, one in ends[1].items())


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_step_leaves_no_trace_in_the_balance(ranks, stage: int, dtype: torch.dtype) -> None:
    assert all(ranks(2).run(with_a_bad_step, stage, dtype))


def resumed(world: World, stage: int, dtype: torch.dtype) -> bool:
    """Whether four steps are two, what is saved of them, and two more: to the last bit."""
    first, second = (balanced(world, stage, dtype) for _ in range(2))
    for number in (0, 1):
        goes(world, first, number)
    saved = everything(first)
    second.scatter(lambda name, key, *part: saved[name, key].flatten()[slice(*part)])
    second.set_optimizer_step(2)
    for number in (2, 3):
        goes(world, first, number)
        goes(world, second, number)
    wanted, got = everything(first), everything(second)
    assert not torch.equal(wanted[LOAD, "weight"], saved[LOAD, "weight"])
    assert first.model.balance.loads() == second.model.balance.loads()
    return all(torch.equal(one, got[key]) for key, one in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balance_goes_on_where_it_was_saved(ranks, dtype: torch.dtype) -> None:
    assert all(ranks(2).run(resumed, 2, dtype))


def save(world: World, engine: Engine, folder: Path) -> Path:
    saver = checkpoint.Saver(folder, world)
    saver.start(engine, Progress(1, 0, {}, "", {}))
    done = saver.finish()
    assert done is not None
    assert done.error is None
    return done.path


def begun(world: World, folder: Path) -> None:
    """From a checkpoint, one without `load`, and the weights of a model: what is not there begins
    even, the rest as saved."""
    engine = balanced(world, 1, torch.float32)
    goes(world, engine, 0)
    wanted = everything(engine)
    kept = dict(engine.model.kept_tensors())
    assert BIAS in kept
    assert LOAD not in kept
    whole = save(world, engine, folder / "whole")
    held = [(*key, full) for key, full in wanted.items() if key[0] != LOAD]
    with mock.patch.object(engine, "gather", return_value=held):
        part = save(world, engine, folder / "part")
    even = torch.full((5,), 0.2)
    for path, begin, load in (
        (whole, checkpoint.load, wanted[LOAD, "weight"]),
        (part, checkpoint.load, even),
        (part, lambda path, fresh: begin_from(path, fresh, print), even),
    ):
        fresh = balanced(world, 3, torch.float32)
        begin(path, fresh)
        got = everything(fresh)
        assert torch.equal(got.pop((LOAD, "weight")), load)
        for key, one in got.items():
            assert key[1] != "weight" or torch.equal(one, wanted[key]), key


def test_a_start_needs_no_load_of_before(ranks, tmp_path: Path) -> None:
    ranks(2).run(begun, tmp_path)
