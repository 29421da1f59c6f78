"""The square of ReLU (So et al. 2021, arXiv 2109.08668), as in Nemotron-H."""

from __future__ import annotations

from torch import Tensor

from train.model.mlps._parts import Ungated, Width, activated

Config = Width


class MLP(Ungated):
    """out(ReLU(up(x))²)."""

    def activation(self, x: Tensor) -> Tensor:
        return activated(x, "relu2")
