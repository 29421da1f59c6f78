"""The record of a run: no fault of it reaches training, and no row is lost or doubled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from train.monitor import lines
from train.monitor.metrics import Recorder
from train.monitor.summary import blocks_in_words, summarise


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "seconds": 1.0,
        "tokens_per_second": 1.0,
    }


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_rows_wait_in_memory_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, 0, 10)
    recorder.step(row(1))
    write = os.write
    with monkeypatch.context() as full:
        # A full disk takes some bytes of a line and no more.
        full.setattr(lines.os, "write", lambda handle, block: write(handle, block[:7]))
        recorder.step(row(2))
        recorder.step(row(3))
    assert steps(tmp_path) == [1]
    recorder.step(row(4))
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("metrics.jsonl fails") == 1
    recorder.close()


# TensorBoard's own thread dies of it, which is what is to be survived.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_gone_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path / "gone", 0, 10)
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    for step in range(1, 11):
        recorder.step(row(step))
    recorder.evaluation({"step": 10, "val_loss": 1.0, "val_bpb": 2.0})
    recorder.close()
    assert "training goes on" in capsys.readouterr().err
    assert [held["step"] for held in recorder.evaluations()] == [10]


def test_tensorboard_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, 0, 10)

    def fails(*_: object) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(recorder._board, "add_scalar", fails)
    for step in range(1, 4):
        recorder.step(row(step))
    assert steps(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().err.count("TensorBoard fails (no space)") == 1
    recorder.close()


def test_going_back_forgets_what_came_after(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 10)
    for step in range(1, 7):
        recorder.step(row(step))
    recorder.evaluation({"step": 6, "val_loss": 1.0, "val_bpb": 2.0})
    recorder.rewind(4)
    recorder.step(row(5))
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert recorder.evaluations() == []
    recorder.close()


def line(step: int, **more: object) -> bytes:
    return json.dumps({"step": step, **more}).encode() + b"\n"


NO_ROWS = [
    b"\xff\xfe no text\n",
    b"no JSON\n",
    b"[1, 2]\n",
    b"7\n",
    b"null\n",
    b'{"stp": 9, "loss": 1}\n',
    b'{"step": "9"}\n',
    b'{"step": null}\n',
    b"\n",
    b"[" * 5000 + b"\n",
    b"1" * 5000 + b"\n",
]


@pytest.mark.parametrize("odd", NO_ROWS, ids=range(len(NO_ROWS)))
def test_what_is_no_row_is_kept_and_no_step_is_doubled(tmp_path: Path, odd: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + odd + line(2) + line(3) + odd + line(4, val_loss=1.0))
    recorder = Recorder(tmp_path, 2, 10)
    recorder.step(row(3))
    recorder.close()
    assert path.read_bytes() == line(1) + odd + line(2) + odd + json.dumps(row(3)).encode() + b"\n"


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        (b'{"step": 3, "lo', b""),  # a kill cut it short
        (b'{"step": 3}', b""),
        (b'{"step": 2}', b'{"step": 2}\n'),
        (b"mine", b"mine\n"),
    ],
)
def test_a_last_line_without_an_end_spoils_no_other(
    tmp_path: Path, end: bytes, kept: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + end)
    recorder = Recorder(tmp_path, 2, 10)
    recorder.step(row(3))
    recorder.close()
    assert path.read_bytes() == line(1) + kept + json.dumps(row(3)).encode() + b"\n"


@pytest.mark.parametrize("odd", [b"", b"mine\n"])
@pytest.mark.parametrize("call", ["truncate", "replace"])
def test_rows_wait_until_those_that_come_again_are_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    odd: bytes,
    call: str,
) -> None:
    """Whatever fails of that, no step is doubled, and evaluations are still known."""
    path = tmp_path / "metrics.jsonl"
    before = line(1) + line(2, val_loss=1.0) + line(3) + odd + line(4)
    path.write_bytes(before)

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os if call == "truncate" else Path, call, fails)
        recorder = Recorder(tmp_path, 2, 10)
        recorder.step(row(3))
        recorder.step(row(4))
        failed = bool(odd) == (call == "replace")
        assert (path.read_bytes() == before) == failed
        assert [held["step"] for held in recorder.evaluations()] == [2]
        assert capsys.readouterr().err.count("metrics.jsonl fails") == failed
    recorder.step(row(5))
    recorder.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(held)["step"] for held in lines if held != odd] == [1, 2, 3, 4, 5]
    assert lines.count(odd) == bool(odd)
    assert not (tmp_path / ".metrics.part").exists()


def test_rows_of_a_file_that_cannot_be_read_are_not_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))

    def fails(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(lines.regular, "content", fails)
        recorder = Recorder(tmp_path, 1, 10)
        recorder.step(row(2))
        assert path.read_text() == (line(1) + line(2)).decode()
    recorder.step(row(3))
    recorder.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_going_back_drops_rows_that_wait_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path, 0, 10)
    with monkeypatch.context() as full:
        full.setattr(lines.os, "write", lambda handle, block: 0)
        for step in range(1, 6):
            recorder.step(row(step))
        recorder.rewind(3)
    recorder.step(row(4))
    recorder.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_evaluations_are_rows_with_numbers(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        line(1, val_loss=2.0)
        + line(2, val_loss="low")
        + line(3, val_loss=1.0, val_bpb=None)
        + b'{"val_loss": 1.0}\n'
        + line(4, val_loss=1, val_bpb=0.5)
    )
    recorder = Recorder(tmp_path, 8, 10)
    assert [held["step"] for held in recorder.evaluations()] == [1, 4]
    bar = "val_bpb", "xz", 1.0
    summarise(recorder, 8, 1, "untrained", lambda: bar, "", ["python"], "runs")
    recorder.close()
    assert "untrained  0.500" in (tmp_path / "log.txt").read_text()


def test_a_name_that_is_not_utf_8_keeps_back_no_line_of_the_log(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, 10)
    recorder.say("caf\udce9.txt: empty")
    recorder.say("the next line")
    recorder.close()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "caf\\udce9.txt: empty" in log
    assert "the next line" in log


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (["attention"] * 30, "attention × 30"),
        (["attention"], "attention"),
        (["gla"] * 3 + ["attention"], "gla × 3, attention"),
        ((["gla"] * 3 + ["attention"]) * 6, "(gla × 3, attention) × 6"),
        (["gla", "attention"] * 2 + ["gla"], "gla, attention, gla, attention, gla"),
        (["attention"] + ["gla"] * 29, "attention, gla × 29"),
    ],
)
def test_repeated_blocks_are_counted(blocks: list[str], words: str) -> None:
    assert blocks_in_words(blocks) == words
