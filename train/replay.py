"""A step of a run, made again on one device: `python -m train replay RUN STEP`."""

from __future__ import annotations

import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from data.settings import ConfigError
from parallel import World, join
from train.config import Config
from train.loop import Trainer
from train.survival import faults, manifest
from train.survival.stop import Watch


def replay(run: Path, config: Config, step: int) -> int:
    """Go on from the last checkpoint before `step` and print what that step gives.

    Everything happens in a folder of its own; the checkpoint is only read.

    Returns:
        0 if loss and gradients are finite, 1 if not.

    Raises:
        ConfigError: no checkpoint from before the step is left.
    """
    older = manifest.newest(run / manifest.CHECKPOINTS, print, before=step)
    if older is None:
        raise ConfigError(
            f"{run} has no good checkpoint from before step {step}; more of them stay with "
            "checkpoint.keep and checkpoint.keep_every"
        )
    config.zero.stage = 0
    config.train.steps = max(config.train.steps, step)
    with (
        join() as world,
        tempfile.TemporaryDirectory() as scratch,
        closing(_from(older, config, Path(scratch), world)) as trainer,
    ):
        kept = _kept(run, step)
        if kept:
            trainer.judge.skipped = set(kept["skipped"].tolist())
        while trainer.step < step - 1:
            trainer.train_step()
        bad: list[str] = []
        for parameter, name in trainer.engine.names.items():
            parameter.register_hook(partial(_look, name, bad))
        row = trainer.train_step()
    assert row is not None
    print(f"step {step}  loss {row['loss']:.6f}  grad_norm {row['grad_norm']:.6f}")
    if kept:
        same = all(
            np.array_equal(batch.tokens, kept[f"tokens_{i}"])
            for i, batch in enumerate(trainer.batches)
        )
        print(f"its batches are {'' if same else 'not '}those that were kept when it went wrong")
    names = list(dict.fromkeys(bad))
    if names:
        print(f"gradients that are not finite, in the order of the backward pass: {names}")
    return 0 if np.isfinite([row["loss"], row["grad_norm"]]).all() and not names else 1


def _from(checkpoint: Path, config: Config, scratch: Path, world: World) -> Trainer:
    """A trainer that goes on from `checkpoint` and writes to `scratch`."""
    place = scratch / manifest.CHECKPOINTS
    place.mkdir()
    (place / checkpoint.name).symlink_to(checkpoint.resolve(), target_is_directory=True)
    return Trainer(config, scratch, [], world, Watch())


def _look(name: str, bad: list[str], gradient: Tensor) -> None:
    if not bool(torch.isfinite(gradient).all()):
        bad.append(name)


def _kept(run: Path, step: int) -> dict[str, np.ndarray]:
    """What was written when the step went wrong; empty if it did not."""
    path = run / faults.FAULTS / f"step-{step:08d}.npz"
    if not path.is_file():
        return {}
    try:
        with np.load(path) as held:
            return {name: held[name] for name in held}
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); move it away") from None
