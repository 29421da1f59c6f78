"""The norm of blocks, mixers and the model's end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from kernels.packing import accumulation_dtype


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with its weight; a zero-centred one keeps the weight less one.

    What is kept then may decay towards zero, as Qwen3-Next does it, and bf16 has its finest
    steps there.
    """

    def __init__(self, dim: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centered else torch.ones(dim))
        self.eps, self.zero_centered = eps, zero_centered

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        weight: Tensor = self.weight
        if self.zero_centered:
            weight = 1 + weight.to(accumulation_dtype(weight.dtype))
        return kernels.rms_norm(x, weight, eps=self.eps, gate=gate)
