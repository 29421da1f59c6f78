"""What a run says of itself before its steps, and when they are done."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from data.settings import ConfigError
from parallel import World
from train.monitor.lines import METRICS
from train.monitor.metrics import Recorder


def blocks_in_words(blocks: Sequence[str]) -> str:
    """The blocks of a model, repetitions counted: `(gla × 3, attention) × 8`."""
    period = next(n for n in range(1, len(blocks) + 1) if _repeats(blocks, n))
    runs = [(name, len(list(run))) for name, run in groupby(blocks[:period])]
    words = ", ".join(f"{name} × {count}" if count > 1 else name for name, count in runs)
    times = len(blocks) // period
    if times == 1:
        return words
    return f"({words}) × {times}" if period > 1 else f"{words} × {times}"


def _repeats(blocks: Sequence[str], period: int) -> bool:
    return len(blocks) % period == 0 and list(blocks) == list(blocks[:period]) * (
        len(blocks) // period
    )


def surroundings(world: World) -> list[str]:
    """What the run finds around it, as far as a user should know."""
    lines = []
    if world.device.type == "cuda" and not (os.environ.get("CC") or shutil.which("cc")):
        raise ConfigError("no C compiler found, and Triton's kernels need one: install gcc")
    if world.device.type == "cpu":
        lines.append(f"no GPU found: training on the CPU with {torch.get_num_threads()} threads")
    if world.size > 1:
        lines.append(f"{world.size} ranks: each batch is one stream, cut evenly over them")
    return lines


def summarise(
    recorder: Recorder,
    step: int,
    tokens: int,
    first: str,
    bar: Callable[[], tuple[str, str, float] | None],
    sample: str,
    command: list[str],
    root: str,
) -> None:
    """Say what was learned, with a sample, and how to go on.

    Args:
        step, tokens: how far the run has come.
        first: what the model is called before its first step.
        bar: asked where something was evaluated: a key of `METRICS`, and who reaches which
            value of it without this model; None if nobody can say.
        sample: text that the model wrote; "" for none.
        command: the words that started this run.
        root: the folder of all runs.
    """
    evaluations = recorder.evaluations()
    known = bar() if evaluations else None
    bytes_told = any("val_bpb" in row for row in evaluations)
    metric = known[0] if known else "val_bpb" if bytes_told else "val_loss"
    rows = [row for row in evaluations if metric in row]
    if rows:
        lines = [f"validation, {METRICS[metric]}", f"  {first:<9}  {rows[0][metric]:.3f}"]
        if known:
            lines.append(f"  {known[1]:<9}  {known[2]:.3f}")
        lines.append(f"  trained    {rows[-1][metric]:.3f}  after {step} steps, {tokens:,} tokens")
        recorder.say("\n".join(lines))
    if sample:
        recorder.say(f"a sample\n{sample}")
        recorder.text("sample", sample, step)
    onward = [word for word in command if not word.startswith("train.steps=")]
    onward.append(f"train.steps={2 * step}")
    recorder.say(
        f"to see the curves:  {shlex.join(['tensorboard', '--logdir', root])}\n"
        f"to go on:           {shlex.join(onward)}"
    )
