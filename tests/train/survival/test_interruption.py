"""A run that is killed or told to end, at any point, has the losses of one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistBackendError, DistNetworkError

from parallel import LostRankError
from tests.train.runs import losses, start, start_ranks, wait_for_line, wait_for_step
from train.__main__ import main
from train.engine import Engine
from train.evaluation import evaluate
from train.model.transformer import Block
from train.survival import checkpoint, stop

NOBODY = -1


# Fifty kills take ten minutes: `pytest -m slow` makes them all.
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 50))]
)
def test_a_kill_at_any_point_changes_no_loss(
    config: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    """With a checkpoint every step, one is being written at almost any moment. The later
    seeds have two ranks, of which one is killed and the other ends by itself.
    """
    chance, ranks = random.Random(seed), 1 if seed < 26 else 2
    command = [str(config), f"run.root={tmp_path}", "checkpoint.every=1"]
    processes = start_ranks(ranks, NOBODY, 0, "", *command, "faults.hang_seconds=10")
    wait_for_step(tmp_path / "tiny", 1, processes[0])
    time.sleep(chance.uniform(0, 1))
    processes[chance.randrange(ranks)].kill()
    for process in processes:
        process.communicate(timeout=60)
    assert main(command) == 0
    assert losses(tmp_path / "tiny") == pytest.approx(
        losses(undisturbed), rel=1e-5 if ranks > 1 else 0, abs=0
    )


def end_now() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Sends:
    """Does what `work` does, with a signal to this process at the call number `chosen`."""

    def __init__(self, work: Any, chosen: int) -> None:
        self.work, self.left = work, chosen

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            end_now()
        return self.work(*arguments, **named)


def slow_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the second checkpoint is being hashed, and the disk is slow."""
    digest = Sends(checkpoint.digest, 2)

    def slow(path: Path) -> str:
        found: str = digest(path)
        time.sleep(0.5)
        return found

    monkeypatch.setattr(checkpoint, "digest", slow)


def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the midst of what stands still for the second checkpoint."""
    gather, saves = Engine.gather, iter(range(100))

    def interrupted(self: Engine) -> Iterator[Any]:
        second = next(saves) == 1
        for number, held in enumerate(gather(self)):
            if second and number == 7:
                end_now()
            yield held

    monkeypatch.setattr(Engine, "gather", interrupted)


def publishing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes just before the rename that publishes."""
    monkeypatch.setattr(checkpoint.os, "rename", Sends(os.rename, 1))


def evaluating(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the midst of the second evaluation: it has four batches."""
    monkeypatch.setattr(evaluate, "distribute", Sends(evaluate.distribute, 6))


def test_a_long_batch_is_given_up_between_blocks(
    config: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the first of two blocks: the second is not begun."""
    command = [str(config), f"run.root={tmp_path}"]
    evaluation, step = 4 * 2, 2 * 2  # batches of two blocks
    chosen = evaluation + 2 * step + 1
    with monkeypatch.context() as patch:
        patch.setattr(stop, "_LONG_BATCH_S", -1)
        sends = Sends(Block.forward, chosen)

        def forward(*arguments: Any, **named: Any) -> Any:
            return sends(*arguments, **named)

        patch.setattr(Block, "forward", forward)
        assert main(command) == 0
    assert sends.left == 0
    assert max(losses(tmp_path / "tiny")) == 2
    assert main(command) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)


def test_ranks_give_up_a_long_batch_together(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """One of two hears of it, in the midst of a step, where every weight is cut in two."""
    command = [str(config), f"run.root={tmp_path}"]
    for process in start_ranks(2, 1, 6, "interrupt", *command, "zero.stage=3"):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert "stopped by another rank at step 2" in log
    assert main(command) == 0
    assert losses(tmp_path / "tiny") == pytest.approx(losses(undisturbed), rel=1e-5)


@pytest.mark.parametrize("moment", [slow_write, copying, publishing, evaluating])
def test_a_run_told_to_end_at_an_awkward_moment_goes_on_to_the_same_bits(
    config: Path,
    undisturbed: Path,
    tmp_path: Path,
    moment: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [str(config), f"run.root={tmp_path}"]
    with pytest.MonkeyPatch.context() as patch:
        moment(patch)
        assert main(command) == 0
    assert "stopped by SIGTERM at step" in capsys.readouterr().out
    folder = tmp_path / "tiny"
    done = max(losses(folder))
    assert done < max(losses(undisturbed))
    assert main(["checkpoints", str(folder), "--verify"]) == 0
    assert f"step-{done:08d}" in capsys.readouterr().out
    assert main(command) == 0
    assert losses(folder) == losses(undisturbed)


def test_a_run_told_to_end_while_text_is_prepared_goes_on(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = [str(config), f"run.root={tmp_path}", f"data.root={tmp_path}/corpora"]
    # The line comes when it is said, not when a buffer is full.
    process = start(*command, PYTHONUNBUFFERED="")
    wait_for_line("training a tokenizer", process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait(60) == 0, output
    assert "stopped by SIGTERM before training began" in output
    assert main(command) == 0
    assert losses(tmp_path / "tiny") == losses(undisturbed)


def test_a_warning_during_an_evaluation_ends_it_to_be_made_again(
    config: Path, tmp_path: Path
) -> None:
    """SIGUSR1 exits with 75, also inside an evaluation that would take minutes."""
    command = [str(config), f"run.root={tmp_path}", "eval.every=1", "eval.tokens=100000000"]
    process = start(*command, "train.steps=100000")
    wait_for_step(tmp_path / "tiny", 2, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = max(losses(tmp_path / "tiny"))
    assert f"stopped by SIGUSR1 at step {done}" in output
    assert (tmp_path / "tiny" / "checkpoints" / f"step-{done:08d}").is_dir()


@pytest.mark.parametrize("error", [LostRankError, DistNetworkError, DistBackendError])
def test_a_rank_that_loses_another_ends_with_one_line(
    config: Path,
    error: type[RuntimeError],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As when one of two is told to end while DeepSpeed sets up its groups."""

    def lost(*_: object) -> int:
        raise error("Broken pipe\nException raised from …")

    monkeypatch.setattr("train.__main__._run", lost)
    assert main([str(config)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("rank 0 ends, as another rank is gone: Broken pipe")
    assert told.err.count("\n") == 1


def test_another_fault_keeps_its_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> int:
        raise RuntimeError("of a tensor's shape")

    monkeypatch.setattr("train.__main__._run", wrong)
    with pytest.raises(RuntimeError, match="of a tensor's shape"):
        main([str(config)])
