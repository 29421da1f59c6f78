"""GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415), the MLP of GPT."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from train.model.mlps._parts import Ungated, Width

Config = Width


class MLP(Ungated):
    """out(GELU(up(x))), GELU by the error function."""

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)
