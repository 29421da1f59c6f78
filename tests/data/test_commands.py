"""`python -m data` does what its help says, and answers mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.corpora import small_tokenizer


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    (made / "tokenizer.model").write_bytes(small_tokenizer().model)
    rows = [json.dumps({"text": f"The {n} brown foxes.\n" * (n % 50 + 1)}) for n in range(400)]
    (made / "rows.jsonl").write_text("\n".join([*rows, "bad line"]))
    (made / "run.yaml").write_text(
        f"""
run: {{name: x}}
train: {{steps: 3, batch_tokens: 1024, seq_len: 128, other: 1}}
data:
  root: {made}/corpora
  tokenizer: {made}/tokenizer.model
  workers: 1
  source:
    - {{name: code, path: {made}/rows.jsonl, weight: 3}}
    - {{name: prose, path: {made}/rows.jsonl, weight: 1}}
"""
    )
    return made


def test_prepare_then_stats(folder: Path) -> None:
    done = command("prepare", str(folder / "run.yaml"))
    assert done.returncode == 0, done.stderr
    assert "is whole; fingerprint" in done.stdout
    assert "code: 1 of 401 documents left out: 1 not JSON" in done.stdout
    done = command("stats", str(folder / "run.yaml"), "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    made = json.loads((folder / "out" / "stats.json").read_text())
    assert [row["source"] for row in made["mixture"]] == ["code", "prose"]
    for row, wanted in zip(made["mixture"], (0.75, 0.25), strict=True):
        assert row["wanted"] == pytest.approx(wanted)
        assert row["achieved"] == pytest.approx(wanted, abs=1e-3)
    assert sum(row["documents"] for row in made["lengths"]) == made["documents"] == 800
    assert sum(row["share_of_tokens"] for row in made["lengths"]) == pytest.approx(1)
    assert set(made["packing"]["methods"]) == {"balanced", "best_fit", "sequential"}
    assert (folder / "out" / "stats.png").read_bytes()[:4] == b"\x89PNG"
    assert "code" in done.stdout


def test_bench_prints_both_beside_datasets(folder: Path) -> None:
    done = command("bench", str(folder / "run.yaml"))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("M tokens/s")]
    assert sum(line.startswith("preparing") for line in rows) == 4
    assert sum(line.startswith("serving") for line in rows) == 2


def test_help_names_every_setting_and_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "data", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "data.packing=balanced" in done.stdout
    assert "train.seq_len=2048" in done.stdout
    for heavy in ("torch", "datasets", "sentencepiece", "matplotlib", "pyarrow"):
        assert f"| {heavy}\n" not in done.stderr.replace("   ", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.packing=balance", "data.packing"),
        ("data.source=nowhere/*.txt", "no file matches"),
        ("train.seq_len=4096", "raise the one or lower the other"),
        ("data.stages=[{step: 1, weights: {cod: 1}}]", "no such source; they are code, prose"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, override: str, line: str) -> None:
    done = command("stats", str(folder / "run.yaml"), override)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
