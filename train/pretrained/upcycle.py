"""Upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every MLP becomes experts that begin as
copies of it.

A token's weights sum to 1, so that without noise the model computes what it did, whatever its
routers choose; what they choose makes the copies differ as they are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from data.settings import ConfigError
from train.model import mlps
from train.model.config import ModelConfig
from train.model.initial import Normal, values
from train.model.mlps import swiglu
from train.model.transformer import check_settings, skeleton

_SEED = 0


@dataclass(frozen=True)
class Upcycling:
    """What becomes of an MLP.

    experts: copies. chosen: of them, by a token. noise: what is added to each number of a copy, a
    standard deviation in units of the matrix's own.

    Raises:
        ConfigError: `noise` is no number from 0 to 1.
    """

    experts: int
    chosen: int
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise ConfigError(f"--noise is {self.noise:g}; it must be from 0 to 1")

    def settings(self, config: ModelConfig) -> ModelConfig:
        """The settings of a model like `config` with experts.

        Raises:
            ConfigError: an MLP cannot become experts, or there are no such experts.
        """
        widths = set()
        for name in dict.fromkeys(config.mlp_blocks):
            module, settings = mlps.resolve(name, config)
            if module is not swiglu:
                raise ConfigError(f"--experts makes experts of swiglu; the model has {name!r}")
            widths.add(swiglu.hidden(config, settings))
        if len(widths) > 1:
            raise ConfigError(f"--experts makes MLPs of one width; the model has {sorted(widths)}")
        experts = {"experts": self.experts, "chosen": self.chosen, "dim": widths.pop()}
        made = dataclasses.replace(
            config, mlp_first=[], mlp_pattern=["experts"], mlps={"experts": experts}
        )
        check_settings(made)
        return made

    def named_weights(
        self, config: ModelConfig, rows: int, named: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights of the model with experts, one at a time.

        Args:
            config: its settings.
            rows: of the embedding.
            named: weights of the model whose MLPs were copied.
        """
        model = skeleton(config, rows)
        dtype = None
        for name, tensor in named:
            dtype = dtype or tensor.dtype
            yield name, self._copies(name, tensor) if ".mlp." in name else tensor
        for name, kept in model.kept_tensors():
            if ".mlp.router." in name:
                first = values(model.firsts[name], _SEED, name, 0, kept.numel())
                is_weight = name.endswith(".weight")
                yield name, first.view(kept.shape).to(dtype if is_weight else kept.dtype)

    def _copies(self, name: str, matrix: Tensor) -> Tensor:
        """(m, n) -> (experts, m, n)."""
        copies = matrix.expand(self.experts, *matrix.shape)
        if not self.noise:
            return copies
        first = Normal(self.noise * float(matrix.float().std()))
        noise = values(first, _SEED, f"{name} upcycled", 0, copies.numel())
        return (copies.float() + noise.view(copies.shape)).to(matrix.dtype)
