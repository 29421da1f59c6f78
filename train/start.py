"""The weights that a new run begins with: `run.start_from`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data.settings import ConfigError
from train.engine import WEIGHT, Engine
from train.pretrained import weights

# Their rows are the pieces of the tokenizer.
TABLES = ("embedding.weight", "head.weight")


def begin_from(folder: Path, engine: Engine, say: Callable[[str], None]) -> None:
    """Set the weights of `engine`, on all ranks together; its optimiser stays as new.

    Models are often given more rows than their tokenizer has pieces, for round numbers; those
    rows stand for nothing, and are left out.

    Args:
        folder: a checkpoint of a run, or what `import` or `convert` wrote.

    Raises:
        ConfigError: the weights are of another model.
    """
    tensors = weights.of_ours(folder)
    shapes = {name: list(engine.shape(parameter)) for parameter, name in engine.names.items()}
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

    def read(name: str, key: str) -> Tensor:
        if key != WEIGHT:
            return torch.zeros(shapes[name])
        weight = tensors.read(name)
        return weight[: shapes[name][0]] if name in TABLES else weight

    engine.scatter(read)
    say(f"beginning with the weights of {folder}")
