"""`generate` and `evaluate` on folders of every kind, on any text, and what they refuse."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from train import Trained, load
from train.__main__ import main
from train.evaluation import longcontext

TEXT = "def one(x: int) -> int:\n    return x + 1  # é 漢\n"
OTHER = "class Two:\n    pass\n"
FEW = ["train.seq_len=16", "train.batch_tokens=32", "--samples", "1"]

pytestmark = pytest.mark.usefixtures("torch_code")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The same two documents in files of several kinds: the words that name them."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain").mkdir()
    for number, text in enumerate((TEXT, OTHER)):
        (folder / "plain" / f"{number}.txt").write_text(text, encoding="utf-8")
    rows = [json.dumps({"content": text}) + "\n" for text in (TEXT, OTHER)]
    (folder / "some.jsonl").write_text("".join(rows), encoding="utf-8")
    with gzip.open(folder / "packed.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(rows)
    return {
        "folder": [f"{folder}/plain"],
        "glob": [f"{folder}/plain/*.txt"],
        "lines": [f"{folder}/some.jsonl", "data.text_field=content"],
        "packed": [f"{folder}/packed.jsonl.gz", "data.text_field=content"],
    }


@pytest.mark.parametrize("kind", ["run", "file", "export", "own", "import"])
def test_generate_prints_what_the_model_generates(
    kind: str, folders: dict[str, Path], model: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokens", "12", "--seed", "3", "--temperature", "1"]
    for prompt in ("import os", ""):
        assert main(["generate", str(folders[kind]), prompt, *words]) == 0
        told = capsys.readouterr()
        wanted = "".join(model.generate(prompt, 12, 1.0, 3))
        assert told.out == f"{prompt}{wanted}\n"
        assert "12 out in" in told.err


def test_generate_prints_while_it_generates(
    model: Trained, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every piece has left before the next token is made."""
    from train.evaluation.generate import Decoder

    events: list[str] = []
    feed = Decoder.feed

    def noting(self: Decoder, tokens: list[int]) -> Any:
        events.append("model")
        return feed(self, tokens)

    class Terminal:
        def write(self, text: str) -> None:
            if text:
                events.append("text")

        def flush(self) -> None:
            events.append("flush")

    monkeypatch.setattr(Decoder, "feed", noting)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["generate", str(folders["run"]), "a", "--tokens", "9", "--seed", "1"]) == 0
    assert events[:3] == ["text", "flush", "model"]
    assert sum(events[i : i + 3] == ["text", "flush", "model"] for i in range(len(events))) > 4


@pytest.mark.parametrize(("fault", "code"), [(BrokenPipeError, 0), (KeyboardInterrupt, 130)])
def test_a_reader_who_has_seen_enough_ends_it_quietly(
    fault: type[BaseException],
    code: int,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Closed:
        left = 0

        def write(self, text: str) -> None:
            self.left -= 1
            if self.left < 0:
                raise fault

        def flush(self) -> None:
            pass

    for words in (["generate", "x"], ["evaluate", "--tokens", "64", *FEW]):
        with monkeypatch.context() as patch:
            closed = Closed()
            closed.left = 3 if words[0] == "generate" else 0
            patch.setattr(sys, "stdout", closed)
            assert main([words[0], str(folders["run"]), *words[1:]]) == code
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "form"),
    [("run", "glob"), ("export", "folder"), ("own", "lines"), ("import", "packed")],
)
def test_evaluate_measures_on_any_text(
    kind: str,
    form: str,
    folders: dict[str, Path],
    texts: dict[str, list[str]],
    model: Trained,
    tmp_path: Path,
) -> None:
    """What `losses` gives for each document, and the bytes of both."""
    path, *settings = texts[form]
    words = ["--text", path, *settings, "train.seq_len=64", "train.batch_tokens=64", *FEW[-2:]]
    out = tmp_path / "out.json"
    assert main(["evaluate", str(folders[kind]), *words, "--json", str(out)]) == 0
    report = json.loads(out.read_text("utf-8"))
    tokenizer = model.tokenizer
    nats = [
        model.losses([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
        for text in (TEXT, OTHER)
    ]
    assert max(len(each) for each in nats) < 64
    total, targets = (sum(float(f(each)) for each in nats) for f in (sum, len))
    size = len((TEXT + OTHER).encode("utf-8"))
    for length in ("64", "128", "256"):
        got = report["validation"][length]
        assert got["val_loss"] == pytest.approx(total / targets, rel=1e-5)
        assert got["val_bpb"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert report["step"] == (8 if kind == "run" else None)
    place = folders[kind] / "evaluation" / report["text"]
    assert (place / "loss_by_position.png").exists()
    # What the run holds out has its own place, which this has not touched.
    assert not list((folders[kind] / "evaluation").glob("*.*"))


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, world: None) -> Path:
    """A run of three steps whose sequences grow after the first, and would once more."""
    folder = tmp_path_factory.mktemp("staged")
    stages = "[{step: 1, seq_len: 48}, {step: 3, seq_len: 64}]"
    settings = """
train: {steps: 3, batch_tokens: 256, seq_len: 32}
eval: {every: 3, tokens: 512, sample_tokens: 0}
checkpoint: {every: 1, keep: 0}
"""
    config = tiny.write(folder / "tiny.yaml", settings)
    text = config.read_text(encoding="utf-8").replace("}\nmodel", f", stages: {stages}}}\nmodel")
    config.write_text(text, encoding="utf-8")
    assert main([str(config), f"run.root={folder}/runs"]) == 0
    return folder / "runs" / "tiny"


def test_evaluate_measures_around_the_longest_sequences_trained_on(staged: Path) -> None:
    for step, longest in ((1, 32), (3, 48)):
        model = load(staged, step=step)
        on, name = longcontext.held_out(model, None, 512)
        assert longcontext.measure(model, on, name, 512, 1)["seq_len"] == longest


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 10**9])
def test_any_number_of_tokens_is_measured_on(staged: Path, tokens: int) -> None:
    model = load(staged)
    on, _ = longcontext.held_out(model, None, tokens)
    for length in (32, 64):
        batches = list(on.validation(tokens, length))
        held = sum(len(batch.tokens) for batch in batches)
        assert held == (tokens if tokens < 10 else sum(on.corpus.validation_spans()[1]))
        row, by_position, by_document = longcontext.validate(model, on, tokens, length)
        assert row["val_loss"] > 0
        assert row["val_bpb"] > 0
        assert "0" in by_position
        assert by_document


@pytest.mark.parametrize("tokens", [-1, 0, 1])
def test_too_few_tokens_are_refused(
    staged: Path, tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = staged.parent.parent / "tiny.yaml"
    assert main(["evaluate", str(staged), f"--tokens={tokens}"]) == 2
    assert main(["evaluate", str(staged), f"eval.tokens={tokens}"]) == 2
    assert main([str(file), f"eval.tokens={tokens}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(f"tokens is {tokens}; it must be at least 2" in line for line in lines)


def test_a_run_that_holds_nothing_out_says_so(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here of a single document."""
    there = staged.parent.parent
    words = ["data.validation=0", "train.steps=1", f"run.root={tmp_path}", "data.stages=[]"]
    words += [f"data.source={there}/00.txt", f"data.root={tmp_path}/corpora"]
    assert main([str(there / "tiny.yaml"), *words]) == 0
    capsys.readouterr()
    run = tmp_path / "tiny"
    for command, said in (("evaluate", "no token to predict"), ("table", "no evaluation of step")):
        assert main([command, str(run)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    # With a text it can be measured.
    words = ["--text", str(there / "01.txt"), "--tokens", "100", *FEW]
    assert main(["evaluate", str(run), *words]) == 0


def test_the_shortest_sequences_are_measured_too(
    folders: dict[str, Path], texts: dict[str, list[str]], tmp_path: Path
) -> None:
    words = ["--text", texts["folder"][0], "train.seq_len=2", "--json", str(tmp_path / "a.json")]
    assert main(["evaluate", str(folders["run"]), *words, "--samples", "1"]) == 0
    report = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert list(report["validation"]) == ["2", "4", "8"]
    assert report["recall"]["lengths"] == [2, 4, 8]


@pytest.mark.parametrize("kind", ["export", "own", "import"])
def test_a_folder_without_text_asks_for_one(
    kind: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folders[kind])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no text of its own to measure on; add --text FILE" in line


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "no file matches it"),
        ("empty.txt", b"", "holds no text (1 empty)"),
        ("bytes.txt", b"\xff\xfe\x00", "holds no text (1 not UTF-8)"),
        ("other.jsonl", b'{"body": "a"}\n', "holds no text (1 no text in field text)"),
        ("broken.parquet", b"PAR1", "holds no text"),
    ],
)
def test_a_text_that_is_none_is_one_line(
    name: str,
    content: bytes | None,
    said: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["evaluate", str(folders["export"]), "--text", str(tmp_path / name)]) == 2
    *others, line = capsys.readouterr().err.splitlines()
    assert not others or name.endswith(".parquet")  # of which its reader speaks too
    assert line.startswith("--text: ")
    assert said in line


def test_what_cannot_be_written_is_one_line(
    folders: dict[str, Path],
    texts: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--text", texts["folder"][0], *FEW, "--json", str(tmp_path / "no" / "such.json")]
    assert main(["evaluate", str(folders["run"]), *words]) == 2
    assert "such.json: No such file" in capsys.readouterr().err.splitlines()[-1]


def test_a_row_that_is_none_does_not_end_the_table(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    for broken in (b"3\n", b'{"loss": 1}\n', b"\xff\n", b'{"step": "a"}\n'):
        (tmp_path / "run" / "metrics.jsonl").write_bytes(broken)
        assert main(["table", str(tmp_path / "run")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
