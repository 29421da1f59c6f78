"""Where the time of a step goes, by a clock that only the parts of the step move."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel import timing
from tests.train.runs import STEPS, rows
from train.__main__ import main
from train.monitor.clock import Clock

NAMES = ["gla", "attention", "gla"]


class Hands:
    """A clock that stands unless it is moved."""

    at = 0.0


class _Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float, waits: float) -> Tensor:
        ctx.save_for_backward(x)  # what checkpointing makes anew
        ctx.backward_takes = backward
        Hands.at += forward
        if waits:  # for a message that left 2 before
            told = timing.observer()
            assert told is not None
            left = told.now()
            Hands.at += 2
            came = told.now()
            Hands.at += waits
            told.waited(left, came)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        assert ctx.saved_tensors
        Hands.at += ctx.backward_takes
        return dy, None, None, None


class Takes(nn.Module):
    def __init__(self, forward: float, backward: float, waits: float = 0.0) -> None:
        super().__init__()
        self.takes = forward, backward, waits

    def forward(self, x: Tensor) -> Tensor:
        return x + _Takes.apply(x, *self.takes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    monkeypatch.setattr(Clock, "now", lambda self: Hands.at)
    yield Clock(NAMES, torch.device("cpu"))
    timing.tell(None)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_each_kind_of_layer_has_the_time_that_it_takes(clock: Clock, checkpointed: bool) -> None:
    blocks = [Takes(1, 10), Takes(2, 20, waits=100), Takes(3, 30)]
    embedding, loss = Takes(5, 50), Takes(7, 70)
    clock.watch(blocks)
    for step in (1, 2):
        clock.start()
        Hands.at += 1000
        clock.mark("data")
        with clock.forward():
            x = embedding(torch.ones(1, requires_grad=True))
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            x = loss(x)
        x.backward()
        clock.mark("reducing")
        Hands.at += 4000
        clock.mark("optimiser")
        clock.stop(step)
    Hands.at += 9999  # between steps, an evaluation: nobody's
    again = 1 if checkpointed else 0  # the forward passes that the backward pass makes anew
    wanted = {
        "data": 1000,
        "embedding": 5,
        "gla": 4 * (1 + again) + 40,
        "attention": (2 + 2) * (1 + again) + 20,
        "loss": 77,
        "reducing": 50,  # after the first block there is the embedding's gradient, and ZeRO's
        "waiting": 100 * (1 + again),
        "optimiser": 4000,
        "travelling": 102 * (1 + again),
    }
    assert list(clock.read()) == [(1, wanted), (2, wanted)]
    assert clock.means() == wanted
    assert not clock.means()


def test_nothing_is_counted_outside_of_steps(clock: Clock) -> None:
    blocks = [Takes(1, 10), Takes(2, 20, waits=100), Takes(3, 30)]
    clock.watch(blocks)
    x = torch.ones(1)
    for block in blocks:
        x = block(x)  # an evaluation
    assert not list(clock.read())


def test_of_every_run_the_parts_of_a_step_are_in_tensorboard(undisturbed: Path) -> None:
    accumulator: Any = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(undisturbed / "tensorboard"))
    accumulator.Reload()
    tags = {tag for tag in accumulator.Tags()["scalars"] if tag.startswith("time/")}
    assert tags >= {f"time/{name}" for name in ("gated_deltanet", "attention", "loss", "optimiser")}
    assert "time/step" in accumulator.Tags()["images"]
    seconds = {row["step"]: row["seconds"] for row in rows(undisturbed) if "loss" in row}
    found = dict.fromkeys(seconds, 0.0)
    for tag in tags - {"time/travelling"}:
        for point in accumulator.Scalars(tag):
            found[point.step] += point.value
    assert len(found) == STEPS
    assert all(0 < found[step] <= seconds[step] + 1e-3 for step in found)


def test_steps_are_traced_and_the_trace_goes_with_the_run(config: Path, tmp_path: Path) -> None:
    words = [str(config), f"run.root={tmp_path}", "train.steps=4", "train.profile=2"]
    assert main(words) == 0
    (path,) = (tmp_path / "tiny" / "profile").iterdir()
    assert path.name == "steps-3-to-4-rank-00.json.gz"
    with gzip.open(path, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert main([*words[:2], "train.steps=1", "--fresh", "--overwrite"]) == 0
    assert not path.exists()
