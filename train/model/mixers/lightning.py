"""Lightning attention of MiniMax-01 (arXiv 2501.08313; Qin et al. 2024, arXiv 2401.04658)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.packing import accumulation_dtype
from parallel import Shard
from train.model.config import ModelConfig
from train.model.linear import Linear
from train.model.mixers._parts import Heads, Later, LinearMixer, recur
from train.model.norm import RMSNorm

Config = Heads
# Written into the published code, whatever its rms_norm_eps says.
NORM_EPS = 1e-6


class Mixer(LinearMixer):
    """A constant decay a head, slower in deeper layers; SiLU on q, k, v; a gated norm.

    slope = 2^(−8 (h + 1) / heads) · (1 − layer / (layers − 1 + 1e-5) + 1e-5) for head h
    """

    kind = "retention"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        # The first 1e-5 is 14 % of the last of 8 layers' factor.
        self.depth = 1 - layer / (model.layers - 1 + 1e-5) + 1e-5
        self.gate = Linear(model.dim, self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_dim, NORM_EPS)

    def slopes(self, x: Tensor) -> Tensor:
        """(value_heads,) minus the log decay of each head, on the device of `x`."""
        dtype = accumulation_dtype(x.dtype)
        head = torch.arange(1, self.value_heads + 1, device=x.device, dtype=dtype)
        return torch.exp2(-8 * head / self.value_heads) * self.depth

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = (F.silu(part) for part in self.project(x, shard, cache))
        gate = Later(self.gate, x)
        o = recur(q, k, v, -self.slopes(x), None, shard, cache, scale=1.0, meanwhile=gate)
        return self.out(self.norm(o.flatten(-2)) * gate.value.sigmoid())
