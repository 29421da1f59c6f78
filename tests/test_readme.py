"""Every command of the README is one that works."""

from __future__ import annotations

import math
import os
import re
import shlex
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Program
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import cluster  # noqa: F401

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# What is made smaller so that a command ends soon; everything else is as written.
SMALL = [
    "train.steps=2",
    "train.batch_tokens=1024",
    "train.seq_len=256",
    "eval.tokens=1024",
    "eval.sample_tokens=4",
]
# Instead of the whole standard library, for what would tokenise it again.
LITTLE = ["data.source=kernels/*.py", "data.vocab_size=600"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("readme")
    return [f"run.root={folder}/runs", f"data.root={folder}/corpora"]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_of_the_readme_works(
    command: str, place: list[str], request: pytest.FixtureRequest
) -> None:
    if command.startswith("pip install"):
        # CI runs the installation itself; what follows it is a command like the others.
        extras = re.findall(r"\[(\w+)\]", command)
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
        command = command.partition(" && ")[2]
    words = shlex.split(command)
    if not words or words[0] == "pytest":
        return
    if words[0] == "tensorboard":
        check_tensorboard(words, place)
        return
    if words[0] == "sbatch":
        # Slurm reads the script and its options and looks for the nodes, of which two are here,
        # but starts nothing.
        slurm: Cluster = request.getfixturevalue("cluster")
        words = [re.sub(r"^--nodes=\d+$", "--nodes=2", word) for word in words[1:]]
        slurm.command("sbatch", "--test-only", *words, folder=ROOT)
        return
    # What torchrun starts begins from nothing, as everything does for a user.
    program = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    # What a command of the README makes in the checkout, it makes aside here.
    folder = place[0].partition("=")[2].removesuffix("runs")
    words = program + [re.sub(r"^(runs/|smoke-)", rf"{folder}\1", word) for word in words[1:]]
    if any(word.endswith(".yaml") for word in words):
        words += place[1:] if "data" in words else [*place, *SMALL]
    if "bench" in words or "smoke-in/" in command:
        words += LITTLE
    done = Program(words, {**os.environ, "OMP_NUM_THREADS": "1"})
    output, _ = done.communicate(timeout=280)
    assert done.returncode == 0, output


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_python_of_the_readme_works(
    snippet: str, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the run that the commands before it have trained."""
    names: dict[str, Any] = {}
    runs = place[0].partition("=")[2]
    exec(snippet.replace('"runs/', f'"{runs}/'), names)
    assert capsys.readouterr().out
    wanted = -names["logits"].double().log_softmax(-1)
    ids = names["ids"]
    assert names["nats"] == pytest.approx(
        sum(float(wanted[i, token]) for i, token in enumerate(ids[1:])), rel=1e-5
    )
    assert names["bits"] == pytest.approx(names["nats"] / math.log(2) / len("import os\n"))


def check_tensorboard(words: list[str], place: list[str]) -> None:
    runs = place[0].partition("=")[2]
    process = Program(["-m", "tensorboard.main", words[1], runs, "--port", "0"], os.environ)
    try:
        for line in process.stdout:
            address = re.search(r"http://localhost:\d+/", line)
            if address:
                time.sleep(1)
                with urllib.request.urlopen(address[0] + "data/plugin/scalars/tags") as answer:
                    assert answer.status == 200
                return
        pytest.fail("TensorBoard gave no address")
    finally:
        process.kill()
        process.communicate()


def test_the_readme_names_only_files_that_exist() -> None:
    # A name with an ending or a last slash is a path; `train/loss` is a scalar.
    rooms = "train|data|kernels|parallel|configs|slurm|tests"
    for name in re.findall(rf"`((?:{rooms})/(?:[\w/]*(?:\.\w+|/))?)`", README):
        assert (ROOT / name).exists(), name
