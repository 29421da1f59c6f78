"""What the job scripts make of what the controller says, without a Slurm: `scontrol` answers from
a list here, one line a question."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ENDED = 'set -euo pipefail; . "$0"; SLURM_JOB_END_TIME=$1; ended_by_slurm 75; echo on'
JOB = Path(__file__).parents[2] / "slurm/job.bash"
SCONTROL = """#!/bin/bash
answers=$(dirname "$0")/answers
head -n 1 "$answers"
tail -n +2 "$answers" >"$answers.rest" && mv "$answers.rest" "$answers"
"""


def _said(folder: Path, then: list[tuple[str, int]], end_time: str = "") -> tuple[str, int]:
    """What `ended_by_slurm 75` says and exits with, as state and restarts are asked for; "on" and
    0 if it returns."""
    at_first = [("RUNNING", 0)] * 2  # is it one of an array, how often was it started again
    (folder / "answers").write_text(
        "".join(
            f"JobId=7 JobName=train JobState={state} Restarts={restarts} Requeue=1\n"
            for state, restarts in at_first + then
        )
    )
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", ENDED, JOB, end_time],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.partition(" job 7: ")[2].strip() or done.stdout.strip(), done.returncode


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ([("RUNNING", 0), ("RUNNING", 0)], ("on", 0)),
        ([("PENDING", 1), ("PENDING", 1)], ("ended by Slurm, which queues it again", 75)),
        ([("COMPLETING", 1), ("PENDING", 1)], ("ended by Slurm, which queues it again", 75)),
        # Queued again between the two questions, or before them: the next start may count as
        # running while the script of this one has not come to its end.
        ([("RUNNING", 0), ("PENDING", 1)], ("ended by Slurm, which queues it again", 75)),
        ([("RUNNING", 1), ("RUNNING", 1)], ("ended by Slurm, which queues it again", 75)),
        ([("CANCELLED", 0), ("CANCELLED", 0)], ("cancelled", 75)),
        ([("COMPLETING", 0), ("COMPLETING", 0)], ("cancelled", 75)),
    ],
)
def test_who_ended_a_job(
    then: list[tuple[str, int]], said: tuple[str, int], tmp_path: Path
) -> None:
    assert _said(tmp_path, then) == said


def test_a_job_that_ran_out_of_time(tmp_path: Path) -> None:
    assert _said(tmp_path, [("TIMEOUT", 0)] * 2, end_time="1") == ("out of time", 75)
