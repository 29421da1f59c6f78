"""What the job scripts make of each way in which ranks and jobs end, on a real Slurm.

A job's ranks are small programs here, run by a `python` that runs the run's file as a script.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/bash
[ "$3" = checkpoints ] || exec env --default-signal=USR1 bash "${@:3}"
"""
# Rank 0 ends with $1, rank 1 with $2 and so on; after a new start all end with 0.
CODES = """
echo "restart $SLURM_RESTART_COUNT of rank $SLURM_PROCID"
[ "$SLURM_RESTART_COUNT" = 0 ] || exit 0
number=$((SLURM_PROCID + 1))
exit "${!number}"
"""
# As a run does, on its first start: saves when it is told to end, and is then done. The line
# "ready" comes when it listens.
TOLD = """
[ "$SLURM_RESTART_COUNT" = 0 ] || exit 0
trap 'echo "rank $SLURM_PROCID has saved"; exit 0' TERM
trap 'echo "rank $SLURM_PROCID has saved"; exit 75' USR1
echo "rank $SLURM_PROCID ready"
while true; do sleep 0.1; done
"""


class Jobs:
    """Submits the shipped scripts from a copy of the checkout's folder."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        for path in ("train/__main__.py", "data/__main__.py"):
            (folder / path).parent.mkdir()
            (folder / path).touch()
        (folder / "codes").write_text(CODES)
        (folder / "told").write_text(TOLD)
        (folder / "bin").mkdir()
        (folder / "bin/python").write_text(PYTHON)
        (folder / "bin/python").chmod(0o755)

    def submit(self, *words: object, **variables: str) -> str:
        output = () if "--array" in str(words) else ("--output=%j.log",)
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return self.cluster.command(
            "sbatch", "--parsable", *output, *words, folder=self.folder, PATH=path, **variables
        )

    def train(self, *words: object, options: tuple[str, ...] = (), **variables: str) -> str:
        """A job of two ranks on two nodes."""
        return self.submit("--nodes=2", *options, "slurm/train.sbatch", *words, **variables)

    def ready(self, *options: str, script: str = "train", **variables: str) -> str:
        """A job whose ranks listen."""
        job = self.submit("--nodes=2", *options, f"slurm/{script}.sbatch", "told", **variables)
        self.until(lambda: self.log(job).count("ready") == 2, job)
        return job

    def preempt(self, *jobs: str) -> None:
        """Another job wants all nodes for a moment; `jobs` give way and end."""
        urgent = self.cluster.command(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
            "--output=/dev/null", "--wrap=true",
        )  # fmt: skip
        for job in jobs:
            self.until(lambda job=job: self.cluster.facts(job)["JobState"] != "RUNNING", job)
        self.cluster.wait(urgent)

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def until(self, fact: Callable[[], bool], job: str) -> None:
        end = time.monotonic() + 60
        while not fact():
            assert time.monotonic() < end, f"{self.cluster.facts(job)}\n{self.log(job)}"
            time.sleep(0.1)

    def end(self, job: str) -> tuple[str, str, str]:
        """State, exit code and restarts of a job, which leaves nothing but its log."""
        facts = self.cluster.wait(job)
        assert not (self.folder / f"train-{job}.codes").exists()
        return facts["JobState"], facts["ExitCode"].split(":")[0], facts["Restarts"]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("ends"), cluster)


def test_one_ranks_code_does_not_hide_anothers(jobs: Jobs) -> None:
    """2 ends the job; another fault is counted; 75 and nothing worse starts it again."""
    worst = {
        ("75", "2"): ("settings must be mended", "FAILED", "2", "0"),
        ("2", "137"): ("settings must be mended", "FAILED", "2", "0"),
        ("75", "1"): ("crashed with code 1 after nothing: queueing", "COMPLETED", "0", "1"),
        ("70", "75"): ("crashed with code 70 after nothing: queueing", "COMPLETED", "0", "1"),
        ("1", "70"): ("crashed with code 70 after nothing: queueing", "COMPLETED", "0", "1"),
        ("0", "75"): ("stopped in time, saved: queueing again", "COMPLETED", "0", "1"),
        ("0", "0"): ("finished", "COMPLETED", "0", "0"),
    }
    submitted = {codes: jobs.train("codes", *codes) for codes in worst}
    for codes, job in submitted.items():
        line, *end = worst[codes]
        assert [*jobs.end(job)] == end, jobs.log(job)
        assert line in jobs.log(job)


def test_a_preempted_job_goes_on_later(jobs: Jobs) -> None:
    """Only its ranks are told; it saves, gives way, and is whole after its second start."""
    scripts = ("train", "smoke")
    preempted = [jobs.ready("--cpus-per-task=2", "--ntasks=2", script=name) for name in scripts]
    jobs.preempt(*preempted)
    for job in preempted:
        assert jobs.end(job) == ("COMPLETED", "0", "1"), jobs.log(job)
        assert jobs.log(job).count("has saved") == 2
        assert jobs.log(job).count("preempted: queueing again") == 1
        assert "start 2 on" in jobs.log(job)


def test_a_job_that_may_not_be_queued_again_says_so(jobs: Jobs) -> None:
    job = jobs.train("codes", "75", "75", options=("--no-requeue",))
    assert jobs.end(job) == ("FAILED", "75", "0")
    assert "stopped in time, saved: Slurm may not queue this job again" in jobs.log(job)
    assert "queueing again" not in jobs.log(job)


def test_a_warning_reaches_the_ranks(jobs: Jobs) -> None:
    """Whether Slurm sends it to the ranks, to the script alone (--signal=B:…), or to all."""
    warned = {whom: jobs.ready() for whom in ("", "--batch", "--full")}
    for whom, job in warned.items():
        jobs.cluster.command("scancel", "--signal=USR1", *whom.split(), job)
    for job in warned.values():
        assert jobs.end(job) == ("COMPLETED", "0", "1"), jobs.log(job)
        assert jobs.log(job).count("has saved") == 2
        assert "stopped in time, saved: queueing again" in jobs.log(job)


def test_who_ends_a_job_is_told(jobs: Jobs) -> None:
    told, cancelled, requeued = jobs.ready(), jobs.ready(), jobs.ready()
    jobs.cluster.command("scancel", "--signal=TERM", told)
    jobs.cluster.command("scancel", cancelled)
    jobs.cluster.command("scontrol", "requeue", requeued)
    assert jobs.end(told) == ("COMPLETED", "0", "0")
    assert "finished, or stopped as told" in jobs.log(told)
    assert jobs.end(cancelled)[::2] == ("CANCELLED", "0")
    jobs.until(lambda: ": cancelled" in jobs.log(cancelled), cancelled)
    assert jobs.end(requeued) == ("COMPLETED", "0", "1")
    assert "ended by Slurm, which queues it again" in jobs.log(requeued)
    assert "cancelled\n" not in jobs.log(requeued)
    for job in (told, cancelled, requeued):
        assert jobs.log(job).count("has saved") == 2


def test_a_task_of_an_array_queues_only_itself_again(jobs: Jobs) -> None:
    """Slurm takes the number of an array's last task for the whole array."""
    (jobs.folder / "line").write_text("exit $((SLURM_RESTART_COUNT ? 0 : $2))")
    (jobs.folder / "sweep.txt").write_text("line 0\nline 0\nline 75\n")
    array = jobs.submit("--array=1-3", "slurm/sweep.sbatch", "sweep.txt")
    facts = [jobs.cluster.wait(f"{array}_{task}") for task in (1, 2, 3)]
    assert [fact["JobState"] for fact in facts] == ["COMPLETED"] * 3
    assert [fact["Restarts"] for fact in facts] == ["0", "0", "1"]
    assert facts[2]["JobId"] == array
    assert "queueing again" in (jobs.folder / f"sweep-{array}-3.log").read_text()


def test_what_the_place_of_submission_exports_is_not_taken_for_the_jobs(jobs: Jobs) -> None:
    """A job may be submitted from another job, or from a container with variables of its own."""
    (jobs.folder / "shown").write_text(
        'echo "<${RANK-} ${WORLD_SIZE-} $SLURM_RESTART_COUNT $SLURM_JOB_END_TIME>"\n'
    )
    outer = {
        "SLURM_RESTART_COUNT": "3", "SLURM_JOB_END_TIME": "1", "SLURM_ARRAY_JOB_ID": "1",
        "SLURM_ARRAY_TASK_ID": "1", "RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    job = jobs.train("shown", **outer)
    assert jobs.end(job) == ("COMPLETED", "0", "0")
    ends = re.findall(r"<  0 (\d+)>", jobs.log(job))
    assert len(ends) == 2, jobs.log(job)
    assert all(int(end) > time.time() for end in ends)
    assert f"job {job}: start 1 on" in jobs.log(job)


def test_crashes_without_a_new_checkpoint_come_to_an_end(jobs: Jobs) -> None:
    """A Python that always dies is started three times, not more."""
    (jobs.folder / "dies").write_text("exit 9")
    job = jobs.train("dies")
    assert jobs.end(job) == ("FAILED", "9", "2")
    assert "crashed with code 9, 3 times after nothing: giving up" in jobs.log(job)


def test_a_limit_that_comes_near_leads_to_a_save_and_a_new_start(jobs: Jobs) -> None:
    """By Slurm's own warning, which it gives sometime in the half minute that it is due."""
    job = jobs.ready("--time=1")
    assert jobs.end(job) == ("COMPLETED", "0", "1"), jobs.log(job)
    assert jobs.log(job).count("has saved") == 2
    assert "stopped in time, saved: queueing again" in jobs.log(job)
