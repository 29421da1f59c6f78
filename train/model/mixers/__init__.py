"""Mixers: the layers in which tokens of a sequence affect each other. A file each.

A mixer's file holds `Config`, a dataclass of its settings (`model.mixers.<name>.*`), and `Mixer`,
a subclass of the one below. `model.pattern` names the file. A model may also use one file under
several names with different settings: then `model.mixers.<name>.kind` names the file. Files whose
names begin with an underscore are no mixers; `_parts.py` has what several mixers share. `gla.py` is
a good one to read first.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from data.settings import ConfigError, build
from parallel import Shard
from parallel.planning.clusters import Recurrent
from train.model.config import ModelConfig


class Mixer(nn.Module, ABC):
    """What a block expects of its mixer.

    Attributes:
        recurrent: its recurrence on `kernels.linear_attention`, by which plans are priced.
    """

    recurrent: Recurrent | None = None

    @abstractmethod
    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        """The mixer of block `layer`, counted from 0; `config` is its file's `Config`.

        Parameters that are neither matrices nor biases declare what they begin as
        (`train.model.initial`).
        """
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        """Mix tokens inside the sequences of `shard`: x (1, t, dim) -> (1, t, dim).

        Args:
            cache: None in training. In generation a dict, empty before a sequence's first call, in
                which the mixer keeps what the sequence's next call needs: a state, or keys and
                values.
        """

    @abstractmethod
    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        """FLOPs of one forward pass over sequences of these lengths, without projections."""


def names() -> list[str]:
    """Names of all mixers: of the files here that do not begin with an underscore."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def resolve(name: str, config: ModelConfig) -> tuple[ModuleType, Any]:
    """The module and the settings of a name in `model.pattern`.

    Raises:
        ConfigError: there is no such mixer, or it has no such setting.
    """
    given = config.mixers.get(name, {})
    if not isinstance(given, dict):
        raise ConfigError(f"model.mixers.{name} is {given!r}; it must be a mapping of settings")
    kind = given.get("kind", name)
    if kind not in names():
        raise ConfigError(f"model.pattern names {kind!r}; the mixers are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{kind}")
    where = f"model.mixers.{name}"
    values = {key: (value, where) for key, value in given.items() if key != "kind"}
    return module, build(module.Config, values, where)


def check(config: ModelConfig) -> None:
    """Check the settings of every mixer in use, and the names in `mixers` and `post_norm`.

    Settings of a mixer that no block uses are allowed if it has a file: the base of a sweep sets
    several.

    Raises:
        ConfigError: as `resolve`, or a name is neither in the pattern nor that of a file.
    """
    for name in dict.fromkeys(config.pattern):
        resolve(name, config)
    given = {f"model.mixers.{name} is set": name for name in config.mixers if name not in names()}
    given |= {f"model.post_norm names {name!r}": name for name in config.post_norm}
    for said, name in given.items():
        if name not in config.pattern:
            raise ConfigError(
                f"{said}, but model.pattern names only {', '.join(dict.fromkeys(config.pattern))}"
            )


def make(name: str, config: ModelConfig, layer: int) -> Mixer:
    """The mixer called `name` for block `layer`."""
    module, settings = resolve(name, config)
    return module.Mixer(config, settings, layer)
