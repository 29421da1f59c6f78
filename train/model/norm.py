"""The RMSNorm of blocks, of mixers, and of the model's end."""

from __future__ import annotations

from torch import Tensor, nn

import kernels
from kernels.packing import accumulation_dtype
from train.model.initial import Constant, declared


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with its weight: (…, dim) -> (…, dim).

    If `zero_centered`, the parameter is the weight less 1, as in Qwen3-Next: weight decay may then
    pull the weight towards 1, and bf16 has its finest steps around 0.
    """

    def __init__(self, dim: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = declared(Constant(0 if zero_centered else 1), dim)
        self.eps, self.zero_centered = eps, zero_centered

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        weight: Tensor = self.weight
        if self.zero_centered:
            weight = 1 + weight.to(accumulation_dtype(weight.dtype))
        return kernels.rms_norm(x, weight, eps=self.eps, gate=gate)
