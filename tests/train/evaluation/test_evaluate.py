"""Evaluation: each octave's mean, the commands about finished runs, and runs that learn recall."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
from parallel import shard
from tests import tiny
from tests.train.runs import ROOT, rows
from train.__main__ import main
from train.config import read
from train.evaluation.evaluate import ByOctave
from train.evaluation.longcontext import validate
from train.evaluation.trained import load
from train.model.transformer import check_settings
from train.monitor.table import kind

RECALL = """
train: {steps: 4, batch_tokens: 256, seq_len: 64, seed: 5}
data: {source: recall, recall: {pairs: 6, queries: 40, keys: 8, values: 8, fewest: 2}}
model:
  layers: 2
  dim: 32
  pattern: [gated_deltanet, attention]
  mixers: {gated_deltanet: {heads: 2, head_dim: 8}, attention: {heads: 2, head_dim: 16}}
eval: {every: 2, tokens: 1024, sample_tokens: 0}
checkpoint: {every: 2, keep: 0}
"""


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, world: None) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    settings = """
train: {steps: 2, batch_tokens: 512, seq_len: 128}
eval: {every: 2, tokens: 2048, sample_tokens: 0}
"""
    config = tiny.write(folder / "tiny.yaml", settings)
    assert main([str(config), f"run.root={folder}/runs"]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def recall_run(tmp_path_factory: pytest.TempPathFactory, world: None) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    (folder / "recall.yaml").write_text(RECALL, encoding="utf-8")
    assert main([str(folder / "recall.yaml"), f"run.root={folder}/runs"]) == 0
    return folder / "runs" / "recall"


def test_octaves_hold_what_belongs_to_them() -> None:
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 300, (500,), generator=random)
    labels = torch.randint(-1, 2, (500,), generator=random).clamp(min=-100)
    labels[labels < 0] = -100
    nats = torch.rand(500, generator=random) * (labels >= 0)
    wanted: dict[str, list[float]] = defaultdict(list)
    for number, label, loss in zip(numbers.tolist(), labels.tolist(), nats.tolist(), strict=True):
        if label >= 0:
            first = 0 if number == 0 else 2 ** int(math.log2(number))
            wanted[str(first)].append(loss)
    octaves = ByOctave()
    for part in (slice(0, 200), slice(200, 500)):
        octaves.add(numbers[part], labels[part], nats[part], nats[part] > 0.5)
    got = octaves.loss()
    assert list(got) == sorted(wanted, key=int)
    for first, losses in wanted.items():
        assert got[first] == pytest.approx(np.mean(losses), rel=1e-6)
    assert octaves.sums[1].sum() == (nats > 0.5).sum()


def test_validation_agrees_with_the_logits_of_every_token(text_run: Path) -> None:
    """The row of the last step, and the same by hand from all logits of the saved weights."""
    made = load(text_run)
    losses: list[np.ndarray] = []
    right: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    size = 0
    byte_lengths = made.tokenizer.byte_lengths()
    for batch in made.stored.material.validation(2048):
        each = np.diff(batch.cu_seqlens)
        with torch.no_grad():
            logits = made.model(torch.from_numpy(batch.tokens), None, shard(each, "cpu"))
        labels = torch.from_numpy(batch.labels)
        asked = batch.labels >= 0
        loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        losses.append(loss.numpy()[asked])
        right.append((logits.argmax(-1) == labels).numpy()[asked])
        positions.append(np.concatenate([np.arange(n) for n in each])[asked])
        lengths.append(np.repeat(each, each)[asked])
        size += int(byte_lengths[batch.labels[asked]].sum())
    loss, hit, position, length = map(np.concatenate, (losses, right, positions, lengths))

    summary, by_position, by_document = validate(made, made.stored.material, 2048, 128)
    (row,) = [row for row in rows(text_run) if row.get("step") == 2 and "val_loss" in row]
    for got in (summary, row):
        assert got["val_loss"] == pytest.approx(loss.mean(), rel=1e-5)
        assert got["val_accuracy"] == pytest.approx(hit.mean(), abs=1e-9)
        assert got["val_bpb"] == pytest.approx(loss.sum() / math.log(2) / size, rel=1e-5)
    for got, numbers in (
        (by_position, position),
        (row["val_loss_by_position"], position),
        (by_document, length),
    ):
        firsts = [0, *(2**n for n in range(8))]
        for first in firsts:
            inside = (numbers >= first) & (numbers < max(1, 2 * first))
            assert (str(first) in got) == inside.any()
            if inside.any():
                assert got[str(first)] == pytest.approx(loss[inside].mean(), rel=1e-4)


def test_evaluate_tells_tables_json_figures_and_tensorboard(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert main(["evaluate", str(text_run), "--json", str(path), "--tokens", "2048"]) == 0
    told = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert list(report["validation"]) == ["128", "256", "512"]
    assert report["needle"]["lengths"] == [32, 64, 128, 256, 512]
    assert all(cell is not None for cell in report["needle"]["accuracy"][0])
    assert report["recall"]["pairs"][:2] == [4, 8]
    assert all(0 <= cell <= 1 for row in report["recall"]["accuracy"] for cell in row if cell)
    # Positions past the training length are there, and told.
    assert {"128", "256"} <= report["loss_by_position"]["512"].keys()
    assert "128" not in report["loss_by_position"]["128"]
    for words in ("loss by position", "length of document", "recall:", "needle:", "128 *"):
        assert words in told
    names = {file.name for file in (text_run / "evaluation").iterdir()}
    assert {"loss_by_position.png", "needle.png", "recall.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_the_loop_shows_loss_by_position(text_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(text_run / "tensorboard"))
    board.Reload()
    assert {"eval/accuracy", "eval/loss_from_position/64"} <= set(board.Tags()["scalars"])
    assert "eval/loss_by_position" in board.Tags()["images"]


def test_generate_goes_on_from_a_prompt(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(text_run), "import os", "--tokens", "9", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out.split("\n\n")[0])
    assert texts[0].startswith("import os")
    assert texts[0] == texts[1] != texts[2]
    assert main(["generate", str(text_run), "x", "--temperature", "-1"]) == 2
    assert "--temperature is -1.0" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "x"]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_a_prompt_that_the_task_does_not_know_is_told_at_the_end(
    recall_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps are done by then: all that is missing is the sample."""
    file = recall_run.parent.parent / "recall.yaml"
    words = [f"run.root={tmp_path}", "train.steps=1", "eval.sample_tokens=3"]
    assert main([str(file), *words]) == 0
    told = capsys.readouterr().out
    assert "no sample: 'def' is no token of the recall task" in told
    assert "to go on:" in told
    assert main(["generate", str(tmp_path / "recall"), "3 4", "--tokens", "2"]) == 0
    assert len(capsys.readouterr().out.split()) == 4
    assert main(["generate", str(tmp_path / "recall"), "def "]) == 2


@pytest.mark.parametrize("word", ["eval.sample_tokens=-1", "eval.temperature=-0.5"])
def test_a_sample_that_cannot_be_made_is_refused_before_the_run(
    word: str, text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(text_run.parent.parent / "tiny.yaml"), word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word.partition("=")[0] in line


def test_a_run_on_recall_goes_on_to_the_same_bits(recall_run: Path) -> None:
    whole = {row["step"]: row["loss"] for row in rows(recall_run) if "loss" in row}
    root, folder = recall_run.parent, recall_run.parent.parent
    (recall_run / "checkpoints" / "step-00000004").rename(folder / "later")
    assert main([str(folder / "recall.yaml"), f"run.root={root}"]) == 0
    assert {row["step"]: row["loss"] for row in rows(recall_run) if "loss" in row} == whole
    evaluations = [row for row in rows(recall_run) if "val_accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert "val_bpb" not in evaluations[0]


def test_the_recall_sweep_is_every_mixer_pure_and_at_three_to_one() -> None:
    lines = (ROOT / "configs/recall/sweep.txt").read_text(encoding="utf-8").splitlines()
    configs = [read(ROOT / file, overrides) for file, *overrides in map(str.split, lines)]
    for config in configs:
        check_settings(config.model)
        data.material(config.data, config.train)
    assert len({config.run.name for config in configs}) == len(lines)
    found = [kind(config.model) for config in configs]
    linear = {mixer for mixer, _ in found} - {"attention"}
    assert {"linear_attention", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet"} <= linear
    both = {(mixer, ratio) for mixer in linear for ratio in ("pure", "3:1")}
    assert set(found) == both | {("attention", "pure")}


def test_the_table_puts_runs_of_one_model_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted: dict[str, str] = {}
    made = {
        "pure": ("[gla]", "{}", [0.25]),
        "first": ("[gla, gla, gla, attention]", "{}", [0.5]),
        "second": ("[gla, gla, gla, attention]", "{}", [0.7]),
        "full": ("[attention]", "{}", [1.0]),
        "local": ("[near, attention]", "{near: {kind: attention, window: 4}}", [0.9]),
    }
    for name, (pattern, settings, (accuracy,)) in made.items():
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(
            f"train: {{steps: 4}}\nmodel: {{pattern: {pattern}, layers: 4, mixers: {settings}}}\n"
        )
        row = {"step": 4, "val_loss": 1.0, "val_accuracy": accuracy}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["table", *(str(tmp_path / name) for name in made)]) == 0
    for line in capsys.readouterr().out.splitlines():
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        wanted[first] = "/".join(cells)
    assert wanted["val_accuracy"] == "pure/3:1/1:1"
    assert wanted["gla"] == "25.0%/60.0% (50.0%–70.0%)/"
    assert wanted["attention"] == "100.0%//"
    assert wanted["near"] == "//90.0%"
    (tmp_path / "pure" / "config.yaml").write_text("train: {steps: 9}\n")
    assert main(["table", str(tmp_path / "pure")]) == 2
    assert "is at step 4 of 9; train it to its end" in capsys.readouterr().err
