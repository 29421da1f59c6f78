"""MLPs: what a block does with each token by itself. A file each, found as mixers are.

An MLP's file holds `Config`, a dataclass of its settings (`model.mlps.<name>.*`), and `MLP`, a
subclass of the one below. `model.mlp_pattern` and `model.mlp_first` name the file, or a name under
which a model uses one (`train.model.kinds`). `_parts.py` has what several share. `relu2.py` is a
good one to read first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.kinds import Kinds


class MLP(nn.Module, ABC):
    """What a block expects of its MLP."""

    @abstractmethod
    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        """The MLP of block `layer`, counted from 0; `config` is its file's `Config`."""
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (1, t, dim) -> (1, t, dim); no token knows of another."""

    @property
    @abstractmethod
    def inner(self) -> int:
        """Numbers a token between its projections: what is kept for the backward pass, and what
        activations read and write."""


KINDS = Kinds(__name__, "mlps", "model.mlp_pattern")
names = KINDS.names
resolve = KINDS.resolve


def check(config: ModelConfig) -> None:
    """Check the settings of every MLP in use, and the names in `mlps`.

    Raises:
        ConfigError: as `resolve`, or a name is neither in a pattern nor that of a file.
    """
    KINDS.check([*config.mlp_first, *config.mlp_pattern], config)


def make(name: str, config: ModelConfig, layer: int) -> MLP | None:
    """The MLP called `name` for block `layer`; None for a block without one."""
    module, settings = resolve(name, config)
    return module.MLP and module.MLP(config, settings, layer)
