"""Bad steps: noticed, undone, skipped, kept, made again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.test_run import STEPS, config, losses, rows, undisturbed, world  # noqa: F401
from train.__main__ import main
from train.engine import Engine
from train.faults import FaultsConfig, Judge

BAD = 5  # the step whose batches are poisoned


def row(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": norm}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad(value: float) -> None:
    judge = Judge(FaultsConfig())
    assert judge.fault(row(2.0)) is None
    assert judge.fault(row(value)) is not None
    assert judge.fault(row(2.0, value)) is not None


def test_a_spike_is_measured_by_the_median_of_good_steps() -> None:
    judge = Judge(FaultsConfig(spike=1.5))
    assert judge.fault(row(100.0)) is None  # nothing to compare with yet
    for _ in range(20):
        assert judge.fault(row(4.0)) is None
    assert judge.fault(row(5.9)) is None
    for _ in range(50):
        assert judge.fault(row(6.1)) is not None  # a bad loss never becomes usual
    assert Judge(FaultsConfig()).fault(row(1e9)) is None


@pytest.fixture
def poison(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:  # noqa: F811
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
    config: Path,  # noqa: F811
    undisturbed: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(config), f"run.root={tmp_path}"]) == 0
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


@pytest.mark.usefixtures("poison")
def test_a_bad_step_stops_the_run_where_that_is_asked_for(
    config: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(config), f"run.root={tmp_path}", "faults.action=stop"]) == 2
    assert f"stopped by the bad step {BAD}: its gradient norm is" in capsys.readouterr().err
