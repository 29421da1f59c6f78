"""A disk or a terminal that fails stops nothing that can go on, and loses no older checkpoint."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.settings import ConfigError
from tests.train.runs import losses, start
from train.__main__ import main
from train.evaluation import longcontext
from train.survival import manifest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB: three checkpoints of the tiny run do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


# TensorBoard's own thread dies of it, which is what is to be survived.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_stops_no_training(
    config: Path, undisturbed: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All steps are made; the exit code says that the last one is not saved. With room, the
    same command goes on from the last checkpoint that fitted.
    """
    command = [str(config), f"run.root={small_disk}"]
    assert main(command) == 1
    told = capfd.readouterr()
    assert "could not be saved" in told.out
    assert "No space left on device" in told.out
    assert "step 8/8" in told.out
    folder = small_disk / "tiny"
    left = manifest.published(folder / manifest.CHECKPOINTS)
    assert left
    assert [manifest.fault(path) for path in left] == [None] * len(left)
    assert not (folder / manifest.CHECKPOINTS / manifest.STAGING).exists()

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main(command) == 0
    assert f"going on from {left[0]}" in capfd.readouterr().out
    assert losses(folder) == losses(undisturbed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_starts_again_on_a_full_disk(
    config: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its settings are there already; a new run is told in a line that there is no room."""
    first = [str(config), f"run.root={small_disk}", "run.name=first", "train.steps=1"]
    assert main(first) == 0
    with open(small_disk / "ballast", "wb", buffering=0) as ballast:
        written = 1
        while written:
            try:
                written = ballast.write(bytes(4096))
            except OSError:
                written = 0
    assert main(first) == 0
    assert main([str(config), f"run.root={small_disk}", "run.name=second"]) == 2
    assert "cannot be written (No space left on device)" in capfd.readouterr().err


def test_what_is_shown_may_fail_altogether(
    config: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """None of the files of rank 0 can be written, and the run is as good as any."""
    folder = tmp_path / "tiny"
    for name in ("metrics.jsonl", "log.txt"):
        (folder / name).mkdir(parents=True)
    for name in ("tensorboard", "faults", "beats"):
        (folder / name).write_text("no folder")
    assert main([str(config), f"run.root={tmp_path}"]) == 0
    told = capfd.readouterr().err
    for what in ("metrics.jsonl", "log.txt", "TensorBoard"):
        assert f"{what} fails" in told
    newest = manifest.published(folder / manifest.CHECKPOINTS)[0]
    wanted = undisturbed / manifest.CHECKPOINTS / newest.name
    assert manifest.read(newest)["files"] == manifest.read(wanted)["files"]


def test_rows_that_are_none_are_in_no_table(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    odd = b'\xff\n[8]\n8\n{"step": 8, "val_loss": "low"}\n{"val_loss": 0.1}\n{"step": 8, "val'
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(odd)
    assert main(["table", str(undisturbed), "--metric", "val_loss"]) == 0
    wanted = capsys.readouterr().out
    assert main(["table", str(folder), "--metric", "val_loss"]) == 0
    assert capsys.readouterr().out == wanted


def test_a_report_that_has_no_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "evaluation").write_text("no folder")
    with pytest.raises(ConfigError, match=r"evaluation: File exists"):
        longcontext.save({"step": 1, "text": None}, tmp_path, None)


def test_a_terminal_that_is_gone_stops_nothing(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """As behind `| head`, with standard error in the same pipe."""
    process = start(config, f"run.root={tmp_path}", PYTHONUNBUFFERED="")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)


@pytest.fixture
def damaged(undisturbed: Path, tmp_path: Path) -> Path:
    """A run's folder with checkpoints of steps 2 to 8: 4, 6 and 8 damaged in three ways."""
    folder = tmp_path / "damaged"
    shutil.copytree(undisturbed, folder)
    eight, six, four, _ = manifest.published(folder / manifest.CHECKPOINTS)
    state = next(eight.glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-1])
    state = next(six.glob("*.safetensors"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 16
    state.write_bytes(content)
    next(four.glob("*.safetensors")).unlink()
    return folder


def test_every_damage_is_told(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(damaged)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["checkpoints", str(damaged), "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for line, said in zip(
        lines, ("bytes, not", "has changed since", "is missing", "whole"), strict=True
    ):
        assert said in line


def test_what_is_damaged_goes_and_never_the_last_that_is_whole(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = damaged / manifest.CHECKPOINTS
    prune = ["checkpoints", str(damaged), "--prune", "--verify", "checkpoint.keep=1"]
    assert main(prune) == 0
    assert capsys.readouterr().out.count("removed ") == 3
    assert [path.name for path in manifest.published(checkpoints)] == [manifest.name(2)]
    next((checkpoints / manifest.name(2)).glob("*.safetensors")).unlink()
    assert main(prune) == 1
    assert [path.name for path in manifest.published(checkpoints)] == [manifest.name(2)]
