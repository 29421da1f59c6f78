"""Mixers: how tokens learn of each other. One file each, found by its name.

A mixer's file holds `Config`, a dataclass of its settings (read from
`model.mixers.<name>`), and `Mixer`, a subclass of the one below. The name in
`model.pattern` is the file's. A name may also be made up in `model.mixers`, with `kind`
naming the file: two kinds of attention in one model, say. Files whose names begin with an
underscore are no mixers: `_parts.py` has what several of them share.
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
from train.model.config import ModelConfig


class Mixer(nn.Module, ABC):
    """What a block expects of its mixer."""

    @abstractmethod
    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        """The mixer of block `layer`, counted from 0; `config` is its file's `Config`."""
        super().__init__()

    def reset_parameters(self) -> None:
        """Initialise what is no Linear's weight or bias; those the model has set already."""

    @abstractmethod
    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        """Mix the tokens of `x` (1, T, dim) within the sequences of `shard`.

        `cache` is None in training. In generation it is a dict, empty before a sequence's
        first call, in which the mixer leaves what the sequence's next call needs.
        """

    @abstractmethod
    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        """FLOPs of one forward over sequences of these lengths, without the projections."""


def names() -> list[str]:
    """Every mixer there is a file for."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def resolve(name: str, config: ModelConfig) -> tuple[ModuleType, Any]:
    """The file and the filled settings behind a name of `model.pattern`.

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
    """Fill the settings of every mixer in use, and refuse names that mean nothing.

    Settings of a mixer that there is may wait for a pattern that uses it: a sweep's base.

    Raises:
        ConfigError: as `resolve`.
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
