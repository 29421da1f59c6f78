"""`python -m train plan`: what it says, and what it answers to wrong words."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data.settings import ConfigError
from train.__main__ import main
from train.config import read
from train.forecast import asked, report, work
from train.forecast.case import Case
from train.model.transformer import Model

SMOKE = str(Path(__file__).parents[3] / "configs" / "smoke.yaml")
FAST = ["train.batch_tokens=2048", "train.seq_len=2048"]


def case(*words: str) -> Case:
    config = read(SMOKE, [*FAST, *words])
    return Case(config, 1, 1, 141e9, "cuda", torch.bfloat16, "h200")


def fits(made: Case) -> bool:
    config = made.config
    held = made.memory(config.zero.stage, config.model.checkpoint_activations)
    return held.total <= made.room


@pytest.mark.parametrize("words", [[], ["model.tie_embeddings=false"]])
def test_parameters_and_flops_are_the_models(words: list[str]) -> None:
    made, config = case(*words), read(SMOKE, [*FAST, *words])
    with torch.device("meta"):
        model = Model(config.model, config.data.vocab_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert made.sizes.total == sum(made.sizes.by_part.values()) == total
    lookup = 0 if config.model.tie_embeddings else model.embedding.weight.numel()
    assert made.sizes.active == total - lookup
    forward = sum(work.flops(made.model, made.lengths(2048)).values())
    assert forward == pytest.approx(model.flops([2048]) / 2048)


def test_the_longest_sequence_that_it_names_is_the_last_that_fits() -> None:
    large = case("model.dim=2048")
    longest = large.longest(1, False)
    assert large.longest(1, True) > 2 * longest
    for tokens, holds in ((longest, True), (int(1.002 * longest), False)):
        words = [f"train.batch_tokens={tokens}", f"train.seq_len={tokens}"]
        assert fits(case("model.dim=2048", *words)) is holds


def test_it_warns_where_the_nodes_that_sbatch_asks_for_do_not_hold_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ["model.layers=16", "model.dim=8192", "train.batch_tokens=32768", "train.seq_len=4096"]
    monkeypatch.setattr("train.forecast.asked.nodes_and_gpus", lambda: (1, 2))
    assert main(["plan", SMOKE, *large]) == 0
    said = capsys.readouterr().out
    assert "WARNING: the 1 node that sbatch asks for, 2 GPUs, cannot hold it" in said
    assert "change first: " in said


def test_what_it_says_to_change_makes_the_run_fit() -> None:
    words = ["model.dim=4096", "model.layers=8", "train.batch_tokens=131072", "train.seq_len=8192"]
    made = report.report(case(*words), None, None)
    assert not report.configured(made)["fits"]
    changes = [line.split(" fits")[0].split() for line in made["change"] if "fits" in line]
    assert changes
    for change in changes:
        assert fits(case(*words, *change)), change


def test_the_job_script_is_read_as_slurm_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "train.sbatch"
    for text, wanted in (
        ("#SBATCH --nodes=4\n##SBATCH --gpus-per-node=8\n", (4, None)),
        ("#SBATCH --nodes=4\n#SBATCH --gpus-per-node=h100:2\n", (4, 2)),
        ("#SBATCH --gpus-per-node 8 # all\n", (1, 8)),
        ("#SBATCH --nodes=3-5\n", (3, None)),
    ):
        script.write_text(text, encoding="utf-8")
        assert asked.nodes_and_gpus(script) == wanted
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"cannot be read .*; say --gpus"):
            asked.nodes_and_gpus(wrong)


def test_a_picture_the_text_and_the_numbers_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "memory.png"
    assert main(["plan", SMOKE, *FAST, "--cpu", "--figure", str(path)]) == 0
    assert path.stat().st_size > 1000
    said = capsys.readouterr().out
    for part in ("parameters", "FLOP a token", "longest sequence", "a checkpoint has", "it fits"):
        assert part in said
    assert main(["plan", SMOKE, *FAST, f"data.root={tmp_path}", "--json", "--gpus", "1"]) == 0
    made = json.loads(capsys.readouterr().out)
    text = report.text(made)  # JSON holds all that the text says
    for part in (
        "a step",
        "MFU",
        " in all; a checkpoint",
        "days by nodes",
        "the text is not prepared here",
    ):
        assert part in text
    assert report.configured(made)["total"] == sum(report.configured(made)["kinds"].values())


def test_fewer_ranks_than_the_slow_one_are_looked_at() -> None:
    made = case("parallel.speeds={7: 0.5}")
    for ranks, slowest in ((8, 0.5), (4, 1.0)):
        with closing(made.on(ranks).planner()) as planner:
            assert min(planner.topology.speeds) == slowest


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
        (["--gpus", "8", "parallel.speeds={8: 0.5}"], "parallel.speeds names rank 8; it must be"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", SMOKE, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.195, "0.195 s"),
        (90, "1.5 minutes"),
        (86399, "24 hours"),
        (271296, "3.14 days"),
    ],
)
def test_a_time_is_said_in_its_unit(seconds: float, said: str) -> None:
    assert report._long(seconds / report.DAY) == said
