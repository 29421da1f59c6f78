"""What a run says when its steps are done."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from train.evaluation.generate import generate
from train.monitor.metrics import METRICS

if TYPE_CHECKING:
    from train.loop import Trainer
    from train.monitor.metrics import Recorder


def summarise(trainer: Trainer) -> None:
    """Say what was learned, with a sample, and how to go on; on all ranks together."""
    config = trainer.config
    sample = ""
    if config.eval.sample_tokens:
        trainer.engine.eval()
        sample = generate(
            trainer.engine.model,
            trainer.material.tokenizer,
            config.eval.prompt,
            config.eval.sample_tokens,
            config.eval.temperature,
        )
    recorder = trainer.recorder
    if recorder is None:
        return
    _compare(trainer, recorder)
    if sample:
        recorder.say(f"a sample\n{sample}")
        recorder.text("sample", sample, trainer.step)
    onward = [word for word in trainer.command if not word.startswith("train.steps=")]
    onward.append(f"train.steps={2 * trainer.step}")
    recorder.say(
        f"to see the curves:  {shlex.join(['tensorboard', '--logdir', config.run.root])}\n"
        f"to go on:           {shlex.join(onward)}"
    )


def _compare(trainer: Trainer, recorder: Recorder) -> None:
    """The validation set as the model at first, a known bar and the trained model see it."""
    rows = recorder.evaluations()
    if not rows:
        return
    first = "at first" if trainer.config.run.start_from else "untrained"
    metric, who, bar = trainer.material.bar(trainer.config.eval.tokens)
    recorder.say(
        f"validation, {METRICS[metric]}\n"
        f"  {first:<9}  {rows[0][metric]:.3f}\n"
        f"  {who:<9}  {bar:.3f}\n"
        f"  trained    {rows[-1][metric]:.3f}"
        f"  after {trainer.step} steps, {trainer.tokens:,} tokens"
    )
