"""A run that is killed or told to end, at any point, has the losses of one that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.train.runs import losses, start, wait_for_step
from train.__main__ import main


# Fifty kills take ten minutes: `pytest -m slow` makes them all.
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 50))]
)
def test_a_kill_at_any_point_changes_no_loss(
    config: Path,
    undisturbed: Path,
    tmp_path: Path,
    seed: int,
) -> None:
    """With a checkpoint every step, one is being written at almost any moment."""
    command = [str(config), f"run.root={tmp_path}", "checkpoint.every=1"]
    process = start(*command)
    wait_for_step(tmp_path / "tiny", 1, process)
    time.sleep(random.Random(seed).uniform(0, 1))
    process.kill()
    process.communicate()
    assert main(command) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)


# Once, beside the other worker's tests, the signal ended the process as if nobody listened.
@pytest.mark.slow
def test_a_run_told_to_end_while_text_is_prepared_goes_on(
    config: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    command = [str(config), f"run.root={tmp_path}", f"data.root={tmp_path}/corpora"]
    process = start(*command)
    assert process.stdout is not None
    for line in process.stdout:
        if "training a tokenizer" in line:
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM before training began" in output
    assert main(command) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)


def test_a_warning_during_an_evaluation_ends_it_to_be_made_again(
    config: Path,
    tmp_path: Path,
) -> None:
    """SIGUSR1 exits with 75, also inside an evaluation that would take minutes."""
    command = [str(config), f"run.root={tmp_path}", "eval.every=1", "eval.tokens=100000000"]
    process = start(*command, "train.steps=100000")
    wait_for_step(tmp_path / "tiny", 2, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = max(losses(tmp_path / "tiny"))
    assert f"stopped by SIGUSR1 at step {done}" in output
    assert (tmp_path / "tiny" / "checkpoints" / f"step-{done:08d}").is_dir()
