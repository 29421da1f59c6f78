"""`python -m train plan`: what it says, and what it answers to wrong words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.__main__ import main
from train.config import read
from train.forecast import asked, report
from train.model.transformer import Model

SMOKE = str(Path(__file__).parents[3] / "configs" / "smoke.yaml")
FAST = ["train.batch_tokens=2048", "train.seq_len=2048"]


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", SMOKE, *FAST, *words, "--gpus", "1", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_parameters_and_flops_are_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["model.tie_embeddings=false"]):
        made = answered(capsys, *words)
        config = read(SMOKE, [*FAST, *words])
        with torch.device("meta"):
            model = Model(config.model, config.data.vocab_size)
        assert made["parameters"]["total"] == sum(p.numel() for p in model.parameters())
        assert made["parameters"]["total"] == sum(made["parameters"]["by_part"].values())
        lookup = 0 if config.model.tie_embeddings else model.embedding.weight.numel()
        assert made["parameters"]["active"] == made["parameters"]["total"] - lookup
        forward = model.flops([2048]) / 2048
        assert made["flops_a_token"]["forward"] == pytest.approx(forward)
        assert made["flops_a_token"]["step"] == pytest.approx(3 * forward)


def test_the_longest_sequence_that_it_names_is_the_last_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    longest = {}
    for row in answered(capsys, "model.dim=2048")["memory"]["rows"]:
        longest[row["stage"], row["checkpoint_activations"]] = row["longest_sequence"]
    assert all(longest[stage, True] > 2 * longest[stage, False] for stage in range(4))
    for tokens, holds in ((longest[1, False], True), (int(1.002 * longest[1, False]), False)):
        words = ["model.dim=2048", f"train.batch_tokens={tokens}", f"train.seq_len={tokens}"]
        made = answered(capsys, *words)
        assert report.configured(made)["fits"] is holds


def test_it_warns_where_the_nodes_that_sbatch_asks_for_do_not_hold_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ["model.layers=16", "model.dim=8192", "train.batch_tokens=32768", "train.seq_len=4096"]
    monkeypatch.setattr("train.forecast.asked.nodes_and_gpus", lambda: (1, 2))
    assert main(["plan", SMOKE, *large]) == 0
    said = capsys.readouterr().out
    assert "WARNING: the 1 node that sbatch asks for do not hold it" in said
    assert "change first: " in said


def test_what_it_says_to_change_makes_the_run_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.dim=4096", "model.layers=8", "train.batch_tokens=131072", "train.seq_len=8192"]
    made = answered(capsys, *words)
    changes = [line.split(" fits")[0].split() for line in made["change"] if "fits" in line]
    assert changes
    for change in changes:
        changed = answered(capsys, *words, *change)
        assert report.configured(changed)["fits"], change


def test_the_job_script_is_read_as_slurm_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "train.sbatch"
    for text, wanted in (
        ("#SBATCH --nodes=4\n##SBATCH --gpus-per-node=8\n", (4, None)),
        ("#SBATCH --nodes=4\n#SBATCH --gpus-per-node=h100:2\n", (4, 2)),
        ("#SBATCH --gpus-per-node 8 # all\n", (1, 8)),
    ):
        script.write_text(text, encoding="utf-8")
        assert asked.nodes_and_gpus(script) == wanted


def test_a_picture_and_the_text_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "memory.png"
    assert main(["plan", SMOKE, *FAST, "--cpu", "--figure", str(path)]) == 0
    assert path.stat().st_size > 1000
    said = capsys.readouterr().out
    for part in ("parameters", "FLOP a token", "longest sequence", "a checkpoint has", "it fits"):
        assert part in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus is 0; it must be from 1 to"),
        (["--gpus", "5000"], "--gpus is 5000; it must be from 1 to"),
        (["--cluster", "nowhere"], "--cluster is 'nowhere'; it must be one of"),
        (["--figure", "memory"], "--figure is 'memory'; it must be a file whose name ends in"),
        (["model.dmi=3"], "model.dmi: no such key"),
        (["data.tokenizer=/nowhere.model"], "nowhere.model"),
        (["model.pattern=[nothing]"], "model.pattern names 'nothing'"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", SMOKE, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
