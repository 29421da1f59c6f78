"""Checkpoints: whole or not there, kept as asked, and the same for any ranks and stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parallel import World, distribute
from tests.streams import streams
from tests.train.test_engine import LENGTHS, MODEL, OPTIM, VOCABULARY
from train.config import ZeroConfig
from train.engine import Engine
from train.model.transformer import Model
from train.optimiser.optim import learning_rate
from train.survival import manifest
from train.survival.checkpoint import Saver, diverged, load
from train.survival.manifest import Progress


@pytest.mark.parametrize(
    ("keep", "keep_every", "old"),
    [
        (2, 0, [80, 70, 60, 50, 40, 30, 20, 10]),
        (2, 40, [70, 60, 50, 30, 20, 10]),
        (0, 0, []),
        (20, 7, []),
    ],
)
def test_the_newest_and_every_nth_are_kept(
    tmp_path: Path, keep: int, keep_every: int, old: list[int]
) -> None:
    paths = [tmp_path / manifest.name(step) for step in range(10, 101, 10)]
    for path in paths:
        path.mkdir()
    known: dict[Path, str | None] = dict.fromkeys(paths)
    found = manifest.surplus(tmp_path, keep, keep_every, known)
    assert [manifest.step_of(path) for path in found] == old


def leg(
    world: World, stage: int, source: Path | None, folder: Path, first: int, last: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train steps [first, last) from a checkpoint and save; losses and the state it began with."""
    torch.manual_seed(0)
    engine = Engine(
        Model(MODEL, VOCABULARY), OPTIM, ZeroConfig(stage=stage), world, torch.float32, 1
    )
    if source:
        load(source, engine)
    began = {f"{name}|{key}": full.clone() for name, key, full in engine.gather()}
    losses = []
    for step, batch in list(enumerate(streams(LENGTHS, VOCABULARY)))[first:last]:
        targets = max(1, int((batch.labels >= 0).sum()))
        loss, nats = engine(*distribute(batch.tokens, batch.labels, batch.cu_seqlens, world))
        engine.backward(loss * (world.size / targets))
        engine.step(learning_rate(OPTIM, step, len(LENGTHS)))
        losses.append(float(world.sum(nats.double())) / targets)
    saver = Saver(folder, world)
    saver.start(engine, Progress(last, 0, {}, "", {}))
    saved = saver.finish()
    assert saved is not None
    assert saved.error is None
    return losses, began


def held(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {
        name: tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_a_run_goes_on_with_other_ranks_and_stages(ranks, tmp_path: Path) -> None:
    """4 → 2 → 3 → 1 ranks and stages 3 → 1 → 2 → 0: the same state to the last bit at each
    change, and the losses of one rank that never stopped, to 2e-5.
    """
    wanted, _ = ranks(1).run(leg, 0, None, tmp_path / "whole", 0, 8)[0]
    losses: list[float] = []
    path = None
    for number, (size, stage) in enumerate([(4, 3), (2, 1), (3, 2), (1, 0)]):
        first = 2 * number
        got, began = ranks(size).run(leg, stage, path, tmp_path / "legs", first, first + 2)[0]
        if path:
            saved = held(path)
            assert began.keys() == saved.keys()
            assert all(torch.equal(began[name], saved[name]) for name in saved)
        losses += got
        path = tmp_path / "legs" / manifest.name(first + 2)
        assert manifest.fault(path) is None
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)


def part(world: World, stage: int) -> str | None:
    """Change one bit of one parameter on rank 1."""
    torch.manual_seed(0)
    engine = Engine(
        Model(MODEL, VOCABULARY), OPTIM, ZeroConfig(stage=stage), world, torch.float32, 1
    )
    assert diverged(engine, world) is None
    parameter = list(engine.names)[3]
    if world.rank == 1:
        parameter.data.view(torch.int32).flatten()[0] ^= 1
    return diverged(engine, world)


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_that_part_are_named(ranks, stage: int) -> None:
    answers = ranks(3).run(part, stage)
    assert len(set(answers)) == 1
    assert "is not the same on every rank (see rank [1])" in answers[0]


def fails_on_one(world: World, folder: Path) -> tuple[str | None, list[str]]:
    """A save while rank 1 cannot write."""
    torch.manual_seed(0)
    engine = Engine(Model(MODEL, VOCABULARY), OPTIM, ZeroConfig(stage=1), world, torch.float32, 1)
    saver = Saver(folder, world)
    saver.start(engine, Progress(1, 0, {}, "", {}))
    saver.finish()
    saver.start(engine, Progress(2, 0, {}, "", {}))
    if world.rank == 1:
        saver._thread.join()
        saver._error = "rank 1: No space left on device"
    saved = saver.finish()
    world.barrier()
    assert saved is not None
    return saved.error, sorted(path.name for path in folder.iterdir())


def test_a_rank_that_cannot_write_publishes_nothing_and_loses_nothing(
    ranks, tmp_path: Path
) -> None:
    for error, names in ranks(2).run(fails_on_one, tmp_path):
        assert error == "rank 1: No space left on device"
        assert "step-00000001" in names
        assert "step-00000002" not in names
