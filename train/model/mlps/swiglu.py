"""SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from train.model import mlps
from train.model.config import ModelConfig
from train.model.mlps._parts import Width, activated, width

Config = Width


def hidden(model: ModelConfig, config: Config) -> int:
    """Its width inside."""
    return width(model, config.dim, 8 / 3)


class MLP(mlps.MLP):
    """out(SiLU(gate) ⊙ up), gate and up in one projection."""

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        inner = hidden(model, config)
        self.up = nn.Linear(model.dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, model.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(activated(self.up(x), "swiglu"))

    @property
    def inner(self) -> int:
        return 3 * self.out.in_features
