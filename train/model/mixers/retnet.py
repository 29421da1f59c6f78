"""Retention (Sun et al. 2023, arXiv 2307.08621): one constant decay a head, rotary q and k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from data.settings import ConfigError, setting
from kernels.packing import accumulation_dtype
from parallel import Shard
from train.model.config import ModelConfig
from train.model.linear import Linear
from train.model.mixers._parts import Heads, Later, LinearMixer, by_head, recur
from train.model.norm import RMSNorm


@dataclass
class Config(Heads):
    rotary_theta: float = setting(10000.0, "base of the rotary wavelengths", above=0, most=1e15)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")


class Mixer(LinearMixer):
    """a = 1 − 2^(−5 − h) for head h, a norm a head and a swish gate on the output."""

    kind = "retention"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.rotary_theta = config.rotary_theta
        self.gate = Linear(model.dim, self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_head_dim, model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        q, k = (
            kernels.rotary_embedding(part, shard.positions, theta=self.rotary_theta)
            for part in (q, k)
        )
        head = torch.arange(self.value_heads, device=x.device, dtype=accumulation_dtype(x.dtype))
        decay = torch.log1p(-torch.exp2(-5 - head))
        gate = Later(self.gate, x)
        o = recur(q, k, v, decay, None, shard, cache, meanwhile=gate)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o, by_head(gate.value, self.value_heads)).flatten(-2))
