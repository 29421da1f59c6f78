"""The square of ReLU (So et al. 2021, arXiv 2109.08668), as in Nemotron-H."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from train.model.mlps._parts import Ungated, Width

Config = Width


class MLP(Ungated):
    """out(ReLU(up(x))²)."""

    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x).square()
