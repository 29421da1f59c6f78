"""Mixers: the layers in which tokens of a sequence affect each other. A file each.

A mixer's file holds `Config`, a dataclass of its settings (`model.mixers.<name>.*`), and `Mixer`,
a subclass of the one below. `model.pattern` names the file, or a name under which a model uses one
(`train.model.kinds`). `_parts.py` has what several mixers share. `gla.py` is a good one to read
first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from parallel import Shard
from parallel.planning.clusters import Recurrent
from train.model.config import ModelConfig
from train.model.kinds import Kinds


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


KINDS = Kinds(__name__, "mixers", "model.pattern")
names = KINDS.names
resolve = KINDS.resolve


def check(config: ModelConfig) -> None:
    """Check the settings of every mixer in use, and the names in `mixers` and `post_norm`.

    Raises:
        ConfigError: as `resolve`, or a name is neither in the pattern nor that of a file.
    """
    KINDS.check(config.pattern, config)
    for name in config.post_norm:
        KINDS.check_used(name, f"model.post_norm names {name!r}", config.pattern)


def make(name: str, config: ModelConfig, layer: int) -> Mixer:
    """The mixer called `name` for block `layer`."""
    module, settings = resolve(name, config)
    return module.Mixer(config, settings, layer)
