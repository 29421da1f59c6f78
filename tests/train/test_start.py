"""No rank ever holds more than its own share while a run starts, however it starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from parallel import World
from tests.train.model.test_initial import Stacked
from train import start
from train.config import ZeroConfig
from train.engine import WEIGHT, Engine, Read
from train.forecast.ledger import Ledger
from train.forecast.states import states
from train.model.config import ModelConfig
from train.model.initial import values
from train.model.transformer import Model, skeleton
from train.optimiser.optim import OptimConfig
from train.survival import checkpoint
from train.survival.manifest import Progress

VOCABULARY, SEED, RANKS = 512, 3, 4
MODEL = ModelConfig(
    pattern=["gated_deltanet", "attention"],
    layers=4,
    dim=192,
    mixers={
        "gated_deltanet": {"heads": 3, "head_dim": 64},
        "attention": {"heads": 3, "head_dim": 64},
    },
)
OPTIMISERS = {"adamw": OptimConfig(), "muon": OptimConfig(name="muon")}
SETTINGS = [
    (stage, dtype, "muon" if (stage + (dtype == torch.float32)) % 2 else "adamw")
    for stage in (0, 1, 2, 3)
    for dtype in (torch.float32, torch.bfloat16)
]


class Real(Ledger):
    """Counts what has memory. Files that are mapped have none here: a page of one is read when it
    is looked at, and is the system's to drop."""

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._note(storage)


def model() -> Model:
    """One that also has what no rule of Headrace knows: stacked matrices, and a buffer."""
    made = skeleton(MODEL, VOCABULARY)
    with torch.device("meta"):
        made.blocks[0].mlp = Stacked(MODEL.dim)  # type: ignore[assignment]
    made.firsts = made._firsts()
    return made


def engine(world: World, stage: int, dtype: torch.dtype, optimiser: str) -> Engine:
    return Engine(model(), OPTIMISERS[optimiser], ZeroConfig(stage=stage), world, dtype, 1)


def check(engine: Engine) -> None:
    """This rank's masters, and the weights that the model computes with, are the first values."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    firsts = engine.model.firsts
    with GatheredParameters(list(engine.names), enabled=engine.stage == 3):
        for parameter, name in engine.names.items():
            wanted = values(firsts[name], SEED, name, 0, parameter.numel())
            part, begin = engine._part(parameter, WEIGHT)
            assert torch.equal(part, wanted[begin:][: part.numel()]), name
            assert torch.equal(parameter.data.flatten(), wanted.to(parameter.dtype)), name
    assert torch.equal(engine.model.blocks[0].mlp.choice_bias, torch.zeros(3))


@contextmanager
def reading(engine: Engine, keys: Collection[str]) -> Iterator[None]:
    """All ranks together read every number once, but for those that are whole on each of them."""
    world, numbers = engine.world, [0]
    scatter = engine.scatter

    def noted(read: Read, *keys: Collection[str]) -> None:
        def note(name: str, key: str, begin: int, end: int) -> torch.Tensor:
            numbers[0] += end - begin
            return read(name, key, begin, end)

        scatter(note, *keys)

    with mock.patch.object(engine, "scatter", noted):
        yield
    kept = [set(keys) & set(engine.state_keys[name]) for name in engine.names.values()]
    sizes = [engine.shape(parameter).numel() for parameter in engine.names]
    of_parameters = sum(n * len(found) for n, found in zip(sizes, kept, strict=True))
    of_buffers = sum(buffer.numel() for buffer in engine.model.buffers())
    once, each = (of_parameters, of_buffers) if engine.stage else (0, of_parameters + of_buffers)
    assert sum(world.gather(numbers[0])) == each * world.size + once


def begun(
    world: World, stage: int, dtype: torch.dtype, optimiser: str, saved: Path
) -> list[tuple[float, float]]:
    """Most bytes, and bytes at the end, of a start by first values, of one from the checkpoint that
    is made of it, and of one from that checkpoint's weights. All begin with the same weights."""
    found: list[tuple[float, float]] = []

    def begin(load: Callable[[Engine], None], keys: Collection[str]) -> Engine:
        with Real() as ledger:
            one = engine(world, stage, dtype, optimiser)
            with reading(one, keys):
                load(one)
        found.append((ledger.peak, ledger.live))
        check(one)
        return one

    with mock.patch("train.engine.BUCKET", 1 << 16):
        one = begin(lambda engine: engine.begin(SEED), {WEIGHT})
        saver = checkpoint.Saver(saved, world)
        saver.start(one, Progress(1, 0, {}, "", {}))
        done = saver.finish()
        assert done is not None
        assert done.error is None
        with mock.patch("train.engine.values"):  # which nothing may draw any more
            begin(
                lambda engine: checkpoint.load(done.path, engine), {WEIGHT, "exp_avg", "exp_avg_sq"}
            )
            one = begin(lambda engine: start.begin_from(done.path, engine, print), {WEIGHT})
    # Small weights stay on every rank of stage 3, once they were gathered.
    for parameter in one.names:
        if getattr(parameter, "ds_persist", False):
            parameter.all_gather()
            parameter.data.zero_()
    checkpoint.load(done.path, one)
    check(one)
    return found


@pytest.mark.parametrize(("stage", "dtype", "optimiser"), SETTINGS, ids=str)
def test_a_start_takes_a_ranks_own_share_and_a_fifth(
    ranks: Callable, tmp_path: Path, stage: int, dtype: torch.dtype, optimiser: str
) -> None:
    """Beside one tensor. The share is what `plan` says that ZeRO always keeps. Whole in fp32 the
    model alone has 4 bytes a parameter, and stage 3 keeps 5 in all on four ranks."""
    shapes = {name: p.shape for name, p in model().named_parameters()}
    with mock.patch("train.engine.BUCKET", 1 << 16):
        kept = states(shapes, OPTIMISERS[optimiser], stage, RANKS, dtype)
    share = kept.weights + kept.optimiser + kept.gradients + kept.bucket * kept.persistent
    largest = 4 * max(shape.numel() for shape in shapes.values())
    for starts in ranks(RANKS).run(begun, stage, dtype, optimiser, tmp_path):
        for peak, left in starts:
            assert left == pytest.approx(share, rel=0.01)
            assert peak < 1.2 * share + largest
