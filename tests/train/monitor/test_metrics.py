"""The record of a run: no fault of it reaches training, and no row is lost or doubled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from train.monitor import lines
from train.monitor.metrics import Recorder


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
