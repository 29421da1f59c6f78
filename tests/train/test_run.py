"""A run from its command: trained, stopped, killed, resumed, refused."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest
from torch import Tensor

from tests import tiny
from tests.ranks import launch
from tests.train.runs import STEPS, losses, rows, start, wait_for_step
from train import loop
from train.__main__ import main
from train.engine import Engine
from train.model.transformer import Model


def test_a_run_leaves_everything_in_its_folder(undisturbed: Path) -> None:
    steps = [row for row in rows(undisturbed) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} <= steps[0].keys()
    assert steps[-1]["tokens"] == STEPS * 2 * 512
    assert steps[-1]["loss"] < steps[0]["loss"]
    # All of it is warm-up, whose last step has the peak of 3e-3.
    rates = [3e-3 * step / STEPS for step in range(1, STEPS + 1)]
    assert [row["lr"] for row in steps] == pytest.approx(rates)
    evaluations = [row for row in rows(undisturbed) if "val_bpb" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert evaluations[-1]["val_bpb"] < evaluations[0]["val_bpb"]
    assert (undisturbed / "config.yaml").exists()
    assert list((undisturbed / "tensorboard").iterdir())


def test_the_share_of_the_peak_counts_a_backward_pass_as_two_forward_passes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both batches of the step, on a device of 1 TFLOP/s, at 1 MFLOP a token."""
    monkeypatch.setattr(loop, "peak_flops", lambda _: 1e12)
    monkeypatch.setattr(Model, "flops", lambda _, lengths: 1e6 * sum(lengths))
    command = [str(config), f"run.root={tmp_path}", "train.steps=1", "eval.sample_tokens=0"]
    assert main(command) == 0
    (row,) = [row for row in rows(tmp_path / "tiny") if "mfu" in row]
    assert row["mfu"] * row["seconds"] == pytest.approx(3 * 2 * 512 * 1e6 / 1e12)


def test_losses_are_scaled_so_that_their_average_is_the_mean_over_the_steps_targets(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed averages gradients over the batches of a step, however many targets each has."""
    given: list[float] = []
    backward = Engine.backward

    def noted(self: Engine, loss: Tensor) -> None:
        given.append(float(loss.detach()))
        backward(self, loss)

    monkeypatch.setattr(Engine, "backward", noted)
    command = [str(config), f"run.root={tmp_path}", "train.steps=1", "eval.sample_tokens=0"]
    assert main([*command, "train.accumulate=3", "model.z_loss=0"]) == 0
    (row,) = [row for row in rows(tmp_path / "tiny") if "lr" in row]
    assert len(given) == 3
    assert sum(given) / 3 == pytest.approx(row["loss"])


def test_tensorboard_holds_the_promised_scalars(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(undisturbed / "tensorboard"))
    board.Reload()
    wanted = {"loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_gb"}
    assert {f"train/{name}" for name in wanted} <= set(board.Tags()["scalars"])
    assert {"eval/loss", "eval/bits_per_byte"} <= set(board.Tags()["scalars"])
    assert "data/stats" in board.Tags()["images"]
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_a_stopped_run_goes_on_to_the_same_bits(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGTERM in the middle saves and exits with 0; the same command ends with the same losses."""
    process = start(config, f"run.root={tmp_path}", "checkpoint.every=100")
    wait_for_step(tmp_path / "tiny", 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    done = max(losses(tmp_path / "tiny"))
    assert 3 <= done < STEPS
    assert main([str(config), f"run.root={tmp_path}", "checkpoint.every=100"]) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)
    last = [row for row in rows(tmp_path / "tiny") if "val_bpb" in row][-1]
    assert last == [row for row in rows(undisturbed) if "val_bpb" in row][-1]


def test_a_stage_holds_for_what_is_left_of_a_run_and_for_its_validation(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is added where the run stands, with another `accumulate`, and begins at its step."""
    words = [str(config), f"run.root={tmp_path}", "eval.every=1", "data.packing=sequential"]
    assert main([*words, "train.steps=2"]) == 0
    stages = "data.stages=[{step: 2, seq_len: 64}, {step: 4, seq_len: 24}]"
    assert main([*words, "train.steps=3", stages]) == 0
    assert "tokens are passed over" in capsys.readouterr().out
    assert main([*words, "train.steps=5", stages, "train.accumulate=1"]) == 0
    evaluated = [row for row in rows(tmp_path / "tiny") if "val_bpb" in row]
    last_octave = [max(map(int, row["val_loss_by_position"])) for row in evaluated]
    # Sequences of 192, 64 and 24 tokens; the octave of the last position with a target.
    assert last_octave == [128, 128, 128, 32, 32, 16]


def test_a_killed_run_loses_at_most_the_steps_since_its_checkpoint(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Or, where that one was being written, since the one before."""
    process = start(config, f"run.root={tmp_path}")
    wait_for_step(tmp_path / "tiny", 7, process)
    process.kill()
    process.wait()
    checkpoints = sorted((tmp_path / "tiny" / "checkpoints").glob("step-*"))
    assert checkpoints[-1].name >= "step-00000004"
    assert main([str(config), f"run.root={tmp_path}"]) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    config: Path, undisturbed: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config), f"run.root={tmp_path}"]
    assert main([*command, "train.steps=4", "optim.schedule=wsd", "optim.decay_fraction=0"]) == 0
    newest = tmp_path / "tiny" / "checkpoints" / "step-00000004"
    state = next(newest.glob("*.safetensors"))
    content = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(content[:-1])
    elif damage == "flip":
        content[-1] ^= 1
        state.write_bytes(content)
    elif damage == "missing":
        state.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    capsys.readouterr()
    assert main([*command, "train.steps=6", "optim.decay_fraction=0"]) == 0
    output = capsys.readouterr().out
    assert "passing over" in output
    assert "going on from" in output
    assert "step-00000002" in output
    assert sorted(losses(tmp_path / "tiny")) == list(range(1, 7))


def test_fresh_overwrites_only_when_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config), f"run.root={tmp_path}", "train.steps=2"]
    assert main(command) == 0
    assert main([*command, "--fresh"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sorted(losses(tmp_path / "tiny")) == [1, 2]
    before = rows(tmp_path / "tiny")[1]["seconds"]
    assert main([*command, "--fresh", "--overwrite"]) == 0
    assert rows(tmp_path / "tiny")[1]["seconds"] != before


def test_a_finished_run_says_so_and_changes_nothing(
    config: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses(undisturbed)
    assert main([str(config), f"run.root={undisturbed.parent}"]) == 0
    assert losses(undisturbed) == before
    assert "train.steps=" in capsys.readouterr().out


def test_a_schedule_that_is_extended_says_how_the_rate_jumps(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps to the end of a cosine, then eight: from half of the peak to nearly all of it."""
    settings = ["optim.schedule=cosine", "optim.warmup_steps=0", "optim.lr=0.001"]
    command = [str(config), f"run.root={tmp_path}", "eval.sample_tokens=0", *settings]
    assert main([*command, "train.steps=2"]) == 0
    assert "jumps" not in capsys.readouterr().out
    assert main([*command, "train.steps=8"]) == 0
    told = capsys.readouterr().out
    # Half a cosine: (1 + cos(π/2)) / 2 of the peak, then (1 + cos(π/4)) / 2.
    assert "the learning rate jumps by these settings: 5.00e-04 → 8.54e-04 in step 3" in told
    assert main([*command, "train.steps=8", "optim.lr=0.002"]) == 0
    assert "jumps" not in capsys.readouterr().out  # no step is left


def test_a_run_that_goes_on_by_its_own_schedule_tells_of_no_jump(
    config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    assert main([str(config), f"run.root={tmp_path}"]) == 0
    assert "jumps" not in capsys.readouterr().out


def test_what_comes_before_the_first_step_is_told(undisturbed: Path) -> None:
    log = (undisturbed / "log.txt").read_text()
    assert "model: gated_deltanet, attention; " in log
    told = re.search(r"validating on ([\d,]+) tokens before step 1\n.* step 0  validation", log)
    assert told
    assert 1024 < int(told[1].replace(",", "")) <= 2048


def test_bf16_on_a_cpu_is_as_quiet_as_fp32(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What stands on the terminal is what the log has, and nothing else."""
    settings = ["train.steps=1", "train.dtype=bf16", "zero.stage=1", "eval.sample_tokens=0"]
    assert main([str(config), f"run.root={tmp_path}", *settings]) == 0
    told = capfd.readouterr()
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert told.out == re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", log)
    assert told.err == ""


def test_two_processes_cannot_train_in_one_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(config, f"run.root={tmp_path}", "train.steps=100000")
    wait_for_step(tmp_path / "tiny", 1, process)
    assert main([str(config), f"run.root={tmp_path}"]) == 2
    assert "another process trains there" in capsys.readouterr().err
    process.kill()
    process.wait()


def test_a_full_disk_loses_no_older_checkpoint(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import errno

    from train.survival import checkpoint

    sync = checkpoint._sync

    def full(path):  # type: ignore[no-untyped-def]
        if path.name == "manifest.json" and '"step": 4,' in path.read_text():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", full)
    assert main([str(config), f"run.root={tmp_path}", "train.steps=6"]) == 0
    assert "step 4 could not be saved" in capsys.readouterr().out
    folder = tmp_path / "tiny" / "checkpoints"
    names = [path.name for path in sorted(folder.iterdir())]
    assert names == ["step-00000002", "step-00000006"]


def test_another_model_is_refused(
    config: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config), f"run.root={undisturbed.parent}", "train.steps=9"]
    assert main([*command, "model.dim=40"]) == 2
    error = capsys.readouterr().err
    assert "is of another model" in error
    assert error.count("\n") == 1
    assert main([*command, "train.seq_len=100"]) == 2
    assert "train.seq_len" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [2])
def test_two_ranks_have_the_losses_of_one(
    config: Path, undisturbed: Path, tmp_path: Path, stage: int
) -> None:
    """And what they saved goes on in one process at another ZeRO stage."""
    words = ["-m", "train", config, f"run.root={tmp_path}", "train.steps=8", f"zero.stage={stage}"]
    first, second = launch(2, *words)
    output, _ = first.communicate(timeout=200)
    assert (first.returncode, second.wait(60)) == (0, 0), output
    assert "one stream, cut evenly over them" in output
    both, one = losses(tmp_path / "tiny"), losses(undisturbed)
    assert both == pytest.approx(one, rel=1e-5)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    for path in checkpoints.glob("step-*"):
        if path.name > "step-00000004":
            path.rename(path.with_name(f"was-{path.name}"))
    assert main([str(config), f"run.root={tmp_path}", "zero.stage=0"]) == 0
    assert losses(tmp_path / "tiny") == pytest.approx(one, rel=1e-5)


def test_a_rate_of_zero_only_evaluates(config: Path, tmp_path: Path) -> None:
    """At the start and the end alone, where `every` is 0; from a seed of more than 32 bits."""
    words = ["optim.lr=0", "eval.every=0", "checkpoint.every=0", "train.seed=5000000000"]
    assert main([str(config), f"run.root={tmp_path}", "train.steps=3", *words]) == 0
    run = tmp_path / "tiny"
    first, last = (row for row in rows(run) if "val_loss" in row)
    assert (first["step"], last["step"]) == (0, 3)
    assert first["val_loss"] == last["val_loss"]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_a_run_is_used_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: None
) -> None:
    tiny.write(
        tmp_path / "tiny.yaml",
        """
train: {steps: 2, batch_tokens: 128, seq_len: 64}
eval: {tokens: 128, sample_tokens: 0}
checkpoint: {every: 1}
""",
    )
    monkeypatch.chdir(tmp_path)
    assert main(["tiny.yaml", "data.source='*.txt'", "data.root=corpora", "run.root=runs"]) == 0
    run = tmp_path / "runs" / "tiny"
    corpora = set((tmp_path / "corpora").iterdir())
    monkeypatch.chdir("/")
    assert main(["checkpoints", str(run), "--verify"]) == 0
    assert main(["replay", str(run), "2"]) == 0
    capsys.readouterr()
    assert main([str(run / "config.yaml"), "train.steps=3"]) == 0
    monkeypatch.chdir(tmp_path / "corpora")
    words = ["data.source=../*.txt", "data.root=.", "run.root=../runs", "train.steps=4"]
    assert main(["../tiny.yaml", *words]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "going on from" in line]
    assert [line.partition(" with ")[2] for line in said] == [
        "train.steps: 2 → 3",
        "train.steps: 3 → 4",
    ]
    assert set((tmp_path / "corpora").iterdir()) == corpora
