"""Parts that several MLPs share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from data.settings import setting
from train.model import mlps
from train.model.config import MOST_INNER, ModelConfig


@dataclass
class Width:
    """Settings of an MLP of two matrices."""

    dim: int | None = setting(
        None, "width inside the MLP (null: model.mlp_dim)", least=1, most=MOST_INNER
    )


def width(model: ModelConfig, given: int | None, times: float) -> int:
    """The width inside an MLP: as given, by `model.mlp_dim`, or so many times dim, up to 64s."""
    return given or model.mlp_dim or 64 * math.ceil(model.dim * times / 64)


def activated(x: Tensor, activation: kernels.Activation, limit: float | None = None) -> Tensor:
    """relu2: ReLU², number by number. swiglu: (…, 2 · hidden), gate and up, -> (…, hidden).

    Args:
        limit: of swiglu, bound of the gate from above, and of up on both sides.
    """
    if activation == "relu2":
        return F.relu(x).square()
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class Ungated(mlps.MLP):
    """out(act(up(x))). A subclass says what `act` is."""

    def __init__(self, model: ModelConfig, config: Width, layer: int) -> None:
        super().__init__(model, config, layer)
        hidden = width(model, config.dim, 4)
        self.up = nn.Linear(model.dim, hidden, bias=False)
        self.out = nn.Linear(hidden, model.dim, bias=False)

    def activation(self, x: Tensor) -> Tensor:
        """(…, hidden) -> (…, hidden), number by number."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))

    @property
    def inner(self) -> int:
        return 2 * self.out.in_features
