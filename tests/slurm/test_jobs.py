"""The shipped job scripts on a real Slurm, in a folder with a space in its name."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
STEPS = 30
PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


class Place:
    """Where a test's jobs run: a configuration, runs and logs."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.config = folder / "tiny run.yaml"

    def submit(self, *words: object, **variables: str) -> str:
        """`sbatch` with a script's words; the job's number."""
        return self.cluster.command(
            "sbatch", "--parsable", f"--output={self.folder}/%j.log", *words, folder=ROOT,
            PATH=PYTHON, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **variables,
        )  # fmt: skip

    def train(self, *options: str, run: str, settings: tuple[str, ...] = ()) -> str:
        return self.submit(
            *options, "slurm/train.sbatch", self.config, f"run.name={run}", *settings
        )

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def finished(self, job: str) -> None:
        facts = self.cluster.wait(job, 300)
        assert facts["JobState"] == "COMPLETED", self.log(job)

    def losses(self, run: str) -> dict[int, float]:
        """Loss by step; every step must be there once."""
        path = self.folder / "runs" / run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [(int(row["step"]), row["loss"]) for row in rows if "loss" in row]
        assert len(dict(steps)) == len(steps)
        return dict(steps)

    def has_step(self, run: str, step: int) -> bool:
        path = self.folder / "runs" / run / "metrics.jsonl"
        return path.exists() and f'"step": {step},' in path.read_text()

    def wait_for_step(self, run: str, step: int, job: str) -> None:
        until(lambda: self.has_step(run, step), self, job, seconds=300)


def until(fact: Callable[[], bool], place: Place, job: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if fact():
            return
        place.cluster.hurry()
        time.sleep(0.2)
    raise TimeoutError(place.log(job))


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny model on some of the checkout's own sources, prepared by the shipped script."""
    folder = tmp_path_factory.mktemp("slurm") / "a place"
    folder.mkdir()
    made = Place(folder, cluster)
    tiny.write(
        made.config,
        f"""
run: {{root: "{folder}/runs"}}
train: {{steps: {STEPS}, batch_tokens: 512, seq_len: 192}}
optim: {{warmup_steps: 0, decay_fraction: 0}}
eval: {{every: 10, tokens: 2048, sample_tokens: 0}}
checkpoint: {{every: 5}}
""",
    )
    job = made.submit("slurm/prepare.sbatch", made.config)
    made.finished(job)
    assert "is whole" in made.log(job)
    return made


def test_preparing_that_runs_out_of_time_goes_on(
    place: Place, cluster: Cluster, tmp_path: Path
) -> None:
    """Its warning comes in the midst of the training of the tokenizer."""
    for source in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        (tmp_path / source.name).write_bytes(source.read_bytes())
    sources = (f"data.source={tmp_path}/*.py", f"data.root={tmp_path}/corpora")
    job = place.submit("slurm/prepare.sbatch", place.config, *sources, "data.vocab_size=4000")
    until(lambda: "training a tokenizer" in place.log(job), place, job)
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    until(lambda: "out of time: queueing again" in place.log(job), place, job)
    place.finished(job)
    assert cluster.facts(job)["Restarts"] == "1"
    assert "is whole" in place.log(job)
    assert "Traceback" not in place.log(job)


@pytest.fixture(scope="module")
def started(place: Place) -> dict[str, str]:
    """Jobs by their runs' names, side by side: one rank, two ranks, and two to be disturbed."""
    smoke = ("--cpus-per-task=1", "slurm/smoke.sbatch", place.config, "run.name=smoke")
    endless = ("train.steps=100000", "checkpoint.every=100000", "eval.every=100000")
    return {
        "smoke": place.submit(*smoke),
        "two": place.train("--nodes=2", run="two", settings=endless),
        "disturbed": place.train("--nodes=2", run="disturbed"),
    }


@pytest.fixture(scope="module")
def undisturbed(place: Place, started: dict[str, str]) -> dict[int, float]:
    """The losses of one rank that nothing happened to, by the shipped smoke test."""
    place.finished(started["smoke"])
    losses = place.losses("smoke")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_a_warning_and_a_killed_rank_lead_to_new_starts_and_the_same_losses(
    place: Place, cluster: Cluster, started: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """And scancel, of the run to compare with, to a checkpoint and no new start."""
    disturbed, two = started["disturbed"], started["two"]
    place.wait_for_step("disturbed", 3, disturbed)
    cluster.command("scancel", "--signal=USR1", disturbed)
    until(lambda: "stopped in time, saved" in place.log(disturbed), place, disturbed)
    stopped = max(place.losses("disturbed"))
    assert f"stopped by SIGUSR1 at step {stopped}" in place.log(disturbed)
    assert (place.folder / f"runs/disturbed/checkpoints/step-{stopped:08d}").is_dir()
    cancelled = False

    def goes_on() -> bool:
        nonlocal cancelled
        if not cancelled and place.has_step("two", STEPS):
            cluster.command("scancel", two)  # as soon as it can be: it takes the others' cores
            cancelled = True
        return place.has_step("disturbed", stopped + 3)

    until(goes_on, place, disturbed, seconds=300)
    rank_of(disturbed, 1).send_signal(signal.SIGKILL)
    place.finished(disturbed)
    assert cluster.facts(disturbed)["Restarts"] == "2"
    assert "crashed with code 137" in place.log(disturbed)
    assert place.log(disturbed).count("going on from") == 2

    if not cancelled:
        place.wait_for_step("two", STEPS, two)
        cluster.command("scancel", two)
    facts = cluster.wait(two)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), place.log(two)
    until(lambda: "cancelled" in place.log(two), place, two)
    assert "on n[1-2], 2 ranks" in place.log(two)
    losses = place.losses("two")
    assert (place.folder / f"runs/two/checkpoints/step-{max(losses):08d}").is_dir()
    first = {step: losses[step] for step in range(1, STEPS + 1)}
    assert first == pytest.approx(request.getfixturevalue("undisturbed"), rel=1e-5)
    # The same ranks: equal to the last bit, over two new starts.
    assert place.losses("disturbed") == first


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_which_starts_again(
    place: Place, cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    """Nothing of it is closed, so that only its silence tells."""
    job = place.train("--nodes=2", run="stopped", settings=("faults.hang_seconds=5",))
    place.wait_for_step("stopped", 7, job)
    rank_of(job, 0).send_signal(signal.SIGSTOP)
    until(lambda: "queueing again" in place.log(job), place, job)
    assert "rank 0 hangs at step" in place.log(job)
    place.finished(job)
    assert int(cluster.facts(job)["Restarts"]) == 1
    assert place.losses("stopped") == pytest.approx(undisturbed, rel=1e-5)


def rank_of(job: str, rank: int) -> psutil.Process:
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            words = process.cmdline()
        except psutil.Error:
            continue
        same = variables.get("SLURM_JOB_ID") == job
        # Not srun, which has the variables of rank 0, and not the shell around a rank.
        trains = "train" in words and process.name().startswith("python")
        if same and variables.get("SLURM_PROCID") == str(rank) and trains:
            return process
    raise LookupError(f"rank {rank} of job {job}")


def test_a_sweep_trains_a_run_for_each_line(place: Place, cluster: Cluster) -> None:
    sweep = place.folder / "sweep file.txt"
    sweep.write_text(
        f"'{place.config}' optim.lr=1e-3\n"
        f"'{place.config}' optim.lr=2e-3 run.name='two e minus three'\n"
        f"'{place.config}' optim.rate=3e-3\n",
        encoding="utf-8",
    )
    job = place.submit("--array=1-3", "slurm/sweep.sbatch", sweep, "train.steps=3")
    states = [cluster.wait(f"{job}_{task}")["JobState"] for task in (1, 2, 3)]
    logs = "\n".join(path.read_text() for path in place.folder.glob("*.log"))
    assert states == ["COMPLETED", "COMPLETED", "FAILED"], logs
    assert "optim.rate: no such key; did you mean" in logs
    first, second = place.losses("sweep-1"), place.losses("two e minus three")
    assert list(first) == list(second) == [1, 2, 3]
    assert first[3] > second[3]


def test_a_bad_setting_ends_with_its_line_and_no_new_start(place: Place, cluster: Cluster) -> None:
    job = place.train("--nodes=2", run="bad", settings=("zero.stage=7",))
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert "zero.stage is 7; it must be one of 0, 1, 2, 3" in place.log(job)
    assert "Traceback" not in place.log(job)


def test_tensorboard_listens_on_loopback_and_says_how_to_reach_it(
    place: Place, cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    # As tcsh and platforms export them.
    common = {"HOST": socket.gethostname(), "PORT": "80", "NAME": "x", "CONFIG": "y"}
    job = place.submit("slurm/tensorboard.sbatch", place.folder / "runs", **common)
    until(lambda: "Press CTRL+C" in place.log(job), place, job)
    port = re.search(r"ssh -N -L 6006:127\.0\.0\.1:(\d+) -J \S+ \S+\n", place.log(job))
    assert port is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/data/runs") as answer:
        assert "smoke" in answer.read().decode()
    cluster.command("scancel", job)


def test_the_scripts_are_clean() -> None:
    scripts = sorted((ROOT / "slurm").iterdir())
    assert len(scripts) == 6
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
