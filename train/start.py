"""What a run begins with: the weights of `run.start_from`, or the settings it had before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data.material import Stream
from data.settings import ConfigError
from train.config import Config, differences
from train.engine import WEIGHT, Engine
from train.optimiser.optim import OptimConfig, learning_rate
from train.pretrained import weights
from train.survival import manifest

# Their rows are the pieces of the tokenizer.
TABLES = ("embedding.weight", "head.weight")


def begin_from(folder: Path, engine: Engine, say: Callable[[str], None]) -> None:
    """Set the weights of `engine`, on all ranks together; its optimiser stays as new.

    Models are often given more rows than their tokenizer has pieces, for round numbers; those
    rows stand for nothing, and are left out.

    Args:
        folder: a checkpoint of a run, or what `import` or `convert` wrote.

    Raises:
        ConfigError: the weights are of another model, or a damaged checkpoint's.
    """
    if (folder / manifest.MANIFEST).exists():
        wrong = engine.world.on_first(lambda: manifest.fault(folder))
        if wrong:
            raise ConfigError(f"run.start_from is {folder}: {wrong}; name another checkpoint")
    tensors = weights.of_ours(folder)
    anew = engine.model.of_training
    shapes = {name: list(shape) for name, shape in engine.shapes.items() if name not in anew}
    for name, wanted in shapes.items():
        held = tensors.shape(name) if name in tensors else None
        if held == wanted:
            continue
        if held and name in TABLES and held[0] > wanted[0] and held[1:] == wanted[1:]:
            say(f"{name}: {held[0] - wanted[0]} rows of {folder} are of no piece; left out")
            continue
        raise ConfigError(
            f"run.start_from is {folder}, of another model: {name} is {held} there and {wanted} "
            "here; take model.* and data.tokenizer from the config.yaml there"
        )

    def read(name: str, _: str, begin: int, end: int) -> Tensor:
        if name in anew:
            return engine.first(name, 0, begin, end)
        # The first of a table's rows are the first of its numbers.
        return tensors.read(name).flatten()[begin:end]

    engine.scatter(read, {WEIGHT})
    say(f"beginning with the weights of {folder}")


def goes_on(path: Path, saved: manifest.Progress, config: Config, stream: Stream) -> Iterator[str]:
    """Lines for the log about a run that goes on from the checkpoint `path`.

    Args:
        stream: of training batches, where the checkpoint's cursor is.

    Raises:
        ConfigError: the next batch is not the one that was promised.
    """
    changed = differences(saved.config, config.to_dict())
    yield f"going on from {path}" + (f" with {'; '.join(changed)}" if changed else "")
    if stream.promised != saved.next_batch:
        raise ConfigError(
            f"{path}: the next batch is not the one that was promised; restore "
            f"{', '.join(line.split(':')[0] for line in changed) or 'the corpus'}, "
            "or set another run.name"
        )
    if stream.passed_over:
        yield (
            f"a stage of data.stages begins inside a window that is packed already: its last "
            f"{stream.passed_over:,} tokens are passed over"
        )
    if jump := rate_jump(saved.config, config, saved.step):
        yield jump


def rate_jump(before: dict[str, Any], config: Config, step: int) -> str | None:
    """How the learning rate jumps where a run goes on after `step` with other settings.

    Args:
        before: its settings until then.

    Returns:
        A line for the log; None where the next step's rate is what it would have been.
    """
    try:
        optim, steps = OptimConfig(**before["optim"]), before["train"]["steps"]
        promised = learning_rate(optim, step, max(steps, step))
        last = learning_rate(optim, max(step - 1, 0), steps)
    except (KeyError, TypeError, ValueError):
        return None  # settings of another version
    after = learning_rate(config.optim, step, config.train.steps)
    if step >= config.train.steps or after == promised:
        return None
    return f"the learning rate jumps by these settings: {last:.2e} → {after:.2e} in step {step + 1}"
