"""Bad steps: noticed, undone, skipped, kept, made again."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel import World, distribute
from tests.streams import streams
from tests.train.runs import STEPS, losses, rows, start_ranks
from tests.train.test_engine import LENGTHS, MODEL, OPTIM, VOCABULARY
from train.__main__ import main
from train.config import ZeroConfig
from train.engine import Engine
from train.model.transformer import Model
from train.survival.faults import FaultsConfig, Judge

BAD = 5  # the step whose batches are poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad(value: float) -> None:
    judge = Judge(FaultsConfig())
    assert judge.fault(2.0, 1.0) is None
    assert judge.fault(value, 1.0) is not None
    assert judge.fault(2.0, value) is not None


def test_a_spike_is_measured_by_the_median_of_good_steps() -> None:
    judge = Judge(FaultsConfig(spike=1.5))
    assert judge.fault(100.0, 1.0) is None  # nothing to compare with yet
    for _ in range(20):
        assert judge.fault(4.0, 1.0) is None
    assert judge.fault(5.9, 1.0) is None
    for _ in range(50):
        assert judge.fault(6.1, 1.0) is not None  # a bad loss never becomes usual
    assert Judge(FaultsConfig()).fault(1e9, 1.0) is None


def test_a_judge_that_goes_on_judges_as_the_one_before() -> None:
    """Through JSON, as a checkpoint keeps it: losses, batches to pass over, and the count."""
    config = FaultsConfig(spike=1.5, most=1)
    one = Judge(config)
    for step in range(70):
        one.fault(4.0 + step / 7, 1.0)
    one.skipped = {3, 80, 81}
    other = Judge(config)
    other.resume(json.loads(json.dumps(one.state(after=70))))
    assert other.skipped == {80, 81}
    for loss in (12.3, 14.9, 17.1, 21.4, 22.9):
        assert one.fault(loss, 1.0) == other.fault(loss, 1.0)
    assert one.pass_over([], 70)
    assert other.pass_over([], 70)
    again = Judge(config)
    again.resume(one.state(after=70))
    assert not one.pass_over([], 70)
    assert not again.pass_over([], 70)


def test_a_run_that_goes_on_sees_the_same_spikes(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Step 18 is three times as bad as usual; one run was stopped after 17 and goes on there."""
    spiked: set[bytes] = set()
    forward = Engine.__call__
    seen: list[bytes] = []

    def call(self: Engine, tokens: Any, *rest: Any) -> Any:
        loss, nats = forward(self, tokens, *rest)
        if self.model.training:
            key = tokens.cpu().numpy().tobytes()
            seen.append(key)
            if len(seen) == 2 * 18:
                spiked.add(key)
            if key in spiked:
                return loss * 6, nats * 6
        return loss, nats

    monkeypatch.setattr(Engine, "__call__", call)
    settings = ["faults.spike=1.5", "optim.warmup_steps=0", "optim.decay_fraction=0"]
    settings += ["eval.every=100", "eval.sample_tokens=0", "checkpoint.every=100"]
    command = [str(config), f"run.root={tmp_path}", *settings]
    assert main([*command, "run.name=whole", "train.steps=19"]) == 0
    assert "step 18 is bad: its loss is" in capsys.readouterr().out
    assert main([*command, "run.name=parts", "train.steps=17"]) == 0
    assert main([*command, "run.name=parts", "train.steps=19"]) == 0
    assert "step 18 is bad: its loss is" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.fixture
def poison(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the gradients of the given forward passes NaN, each batch known by its tokens."""
    seen: list[bytes] = []
    chosen: set[bytes] = set()
    forward = Engine.__call__

    def call(self: Engine, tokens: Any, *rest: Any) -> Any:
        loss, nats = forward(self, tokens, *rest)
        if self.model.training:
            key = tokens.cpu().numpy().tobytes()
            seen.append(key)
            # The second batch of the step: two are accumulated.
            if len(seen) == 2 * BAD:
                chosen.add(key)
            if key in chosen:
                loss = loss * math.nan
        return loss, nats

    monkeypatch.setattr(Engine, "__call__", call)
    return call


@pytest.mark.usefixtures("poison")
def test_a_bad_step_is_rolled_back_skipped_kept_and_made_again(
    config: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(config), f"run.root={tmp_path}", "faults.action=roll back"]) == 0
    output = capsys.readouterr().out
    assert re.search(f"step {BAD} is bad: its gradient norm is (nan|inf)", output)
    assert "rolled back to step 4" in output
    folder = tmp_path / "tiny"
    got, wanted = losses(folder), losses(undisturbed)
    assert list(got) == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["grad_norm"]) for row in rows(folder) if "loss" in row)
    # Up to the bad step the run is the undisturbed one; then it has other batches.
    assert [got[step] for step in range(1, BAD)] == [wanted[step] for step in range(1, BAD)]
    assert got[BAD] != wanted[BAD]
    with np.load(folder / "faults" / f"step-{BAD:08d}.npz") as kept:
        assert {"tokens_0", "labels_1", "cu_seqlens_1", "skipped"} <= set(kept)
        assert len(kept["tokens_0"]) == 512

    assert main(["replay", str(folder), str(BAD)]) == 1
    output = capsys.readouterr().out
    assert re.search(f"step {BAD}  loss {wanted[BAD]:.6f}  grad_norm (nan|inf)", output)
    assert "its batches are those that were kept" in output
    assert "embedding" in output
    assert main(["replay", str(folder), str(BAD - 1)]) == 0
    assert f"loss {wanted[BAD - 1]:.6f}" in capsys.readouterr().out
    assert losses(folder) == got

    # Passed over in place, without a way back, the losses are the very same.
    skipping = ("run.name=skipping", "faults.action=skip", "checkpoint.every=100")
    assert main([str(config), f"run.root={tmp_path}", *skipping]) == 0
    output = capsys.readouterr().out
    assert re.search(f"step {BAD} is bad: its gradient norm is (nan|inf)", output)
    assert "rolled back" not in output
    assert losses(tmp_path / "skipping") == got
    assert (tmp_path / "skipping" / "faults" / f"step-{BAD:08d}.npz").exists()
    board = EventAccumulator(str(tmp_path / "skipping" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Tensors("faults/text_summary")] == [BAD]


@pytest.mark.usefixtures("poison")
def test_two_ranks_roll_back_together(config: Path, tmp_path: Path) -> None:
    """One of them finds it bad; the losses are those of one rank that the same befell."""
    settings = ("faults.action=roll back", f"run.root={tmp_path}")
    for process in start_ranks(2, 1, 2 * BAD, "poison", config, *settings, "run.name=two"):
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
    log = (tmp_path / "two" / "log.txt").read_text()
    assert f"step {BAD} is bad" in log
    assert "rolled back to step 4" in log
    assert main([str(config), *settings]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "tiny"), rel=1e-5)


@pytest.mark.usefixtures("poison")
def test_a_bad_step_stops_the_run_where_that_is_asked_for(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(config), f"run.root={tmp_path}", "faults.action=stop"]) == 2
    assert f"stopped by the bad step {BAD}: its gradient norm is" in capsys.readouterr().err


def steps_with_bad_ones(
    world: World, stage: int, dtype: torch.dtype, optimizer: Literal["adamw", "muon"]
) -> tuple[list[str], bool]:
    """Two good steps of two batches, with a refused one and one of NaN on the last rank between.

    Returns:
        What a bad step changed, and whether the second good step ended as if none had been.
    """
    torch.manual_seed(0)
    ends, changed = [], []
    for bad in (False, True):
        torch.manual_seed(0)
        model = Model(MODEL, VOCABULARY)
        optim = dataclasses.replace(OPTIM, name=optimizer)
        engine = Engine(model, optim, ZeroConfig(stage=stage), world, dtype, 2)
        first, refused, poisoned, last = zip(*[iter(streams(LENGTHS, VOCABULARY))] * 2, strict=True)
        make(engine, world, first, 1.0, True)
        if bad:
            before = state(engine)
            make(engine, world, refused, 1.0, False)
            changed += [
                name for name, full in state(engine).items() if not same(full, before[name])
            ]
            factor = math.nan if world.rank == world.size - 1 else 1.0
            norm = make(engine, world, poisoned, factor, None)
            assert not math.isfinite(norm)
            changed += [
                name for name, full in state(engine).items() if not same(full, before[name])
            ]
        make(engine, world, last, 1.0, True)
        ends.append(state(engine))
    return changed, all(same(ends[0][name], ends[1][name]) for name in ends[0])


def make(engine: Engine, world: World, batches: Any, factor: float, verdict: bool | None) -> float:
    """A step; its gradient norm. verdict: None asks whether the norm is finite."""
    norm = None
    for batch in batches:
        loss, _ = engine(*distribute(batch.tokens, batch.labels, batch.cu_seqlens, world))
        engine.backward(loss * factor)
        norm = engine.step(1e-2, lambda norm: math.isfinite(norm) if verdict is None else verdict)
    assert norm is not None
    return norm


def state(engine: Engine) -> dict[str, torch.Tensor]:
    bits = {f"{name}|{key}": full.clone() for name, key, full in engine.gather()}
    if engine.stage < 3:
        bits |= {name: parameter.detach().clone() for parameter, name in engine.names.items()}
    counts = [held["step"].clone() for held in engine._optimizer.state.values() if "step" in held]
    return bits | {"steps": torch.stack(counts)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "stage", "optimizer"),
    [(1, 0, "adamw"), (1, 1, "muon"), (2, 0, "muon"), (2, 2, "adamw"), (2, 3, "muon")],
)
def test_a_bad_step_changes_no_bit_on_any_rank(
    ranks, size: int, stage: int, dtype: torch.dtype, optimizer: str
) -> None:
    for changed, as_if_none_had_been in ranks(size).run(
        steps_with_bad_ones, stage, dtype, optimizer
    ):
        assert changed == []
        assert as_if_none_had_been
