"""Runs of the train command, for tests: started, watched, and read back."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tests.processes import ROOT, Program
from tests.ranks import launch

STEPS = 8


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; every step must be there once."""
    steps = [(int(row["step"]), row["loss"]) for row in rows(folder) if "loss" in row]
    assert len(dict(steps)) == len(steps)
    return dict(steps)


def start(*arguments: object, **variables: str) -> Program:
    """`python -m train`, with its lines to be read; variables: of its environment."""
    return Program(["-m", "train", *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **variables})


def start_ranks(
    count: int, sick: int, batch: int, illness: str, *arguments: object
) -> list[Program]:
    """Ranks of a run as a launcher starts them, one of which falls ill (see `sick.py`)."""
    script = ROOT / "tests/train/survival/sick.py"
    return launch(count, script, sick, batch, illness, *arguments)


def wait_for_step(folder: Path, step: int, process: Program) -> None:
    """Until the run has written the row of a step."""
    path = folder / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} after two minutes")


def wait_for_line(text: str, process: Program) -> None:
    """Until the process has written a line with this text."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}: {''.join(seen)}")
