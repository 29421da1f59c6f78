"""What a run says when its steps are done."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from train.monitor.metrics import METRICS, Recorder


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
    rows = recorder.evaluations()
    if rows:
        known = bar()
        metric = known[0] if known else "val_bpb" if "val_bpb" in rows[-1] else "val_loss"
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
