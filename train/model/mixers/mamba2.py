"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): state space duality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from data.settings import ConfigError, setting
from parallel import Shard
from train.model.config import MOST_HEAD_DIM, MOST_HEADS, MOST_TAPS, ModelConfig
from train.model.initial import Constant, declared
from train.model.linear import Linear
from train.model.mixers._parts import Heads, Later, LinearMixer, decay_parameters, full, recur


@dataclass
class Config:
    heads: int = setting(8, "heads of x; usually 2 model.dim / head_dim", least=1, most=MOST_HEADS)
    head_dim: int = setting(64, "width of a head of x", least=1, most=MOST_HEAD_DIM)
    groups: int = setting(
        1, "groups of heads that share B and C, and groups of the output's norm", least=1
    )
    state_dim: int = setting(128, "width of B and C", least=1, most=MOST_HEAD_DIM)
    conv_size: int = setting(4, "tokens under the short convolution", least=1, most=MOST_TAPS)

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ConfigError(f"groups is {self.groups}; it must divide heads, {self.heads}")


class Mixer(LinearMixer):
    """S_t = exp(dt_t A) S_{t−1} + B_t (dt_t x_t)ᵀ, y_t = S_tᵀ C_t + D x_t; q is C, k is B."""

    kind = "mamba2"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        heads = config.heads
        shape = Heads(config.groups, heads, config.state_dim, config.head_dim, config.conv_size)
        super().__init__(model, shape, layer)
        self.conv_bias = nn.Parameter(torch.empty(sum(self.widths)))
        self.dt = nn.Linear(model.dim, heads, bias=False)
        self.gate = Linear(model.dim, self.value_dim, bias=False)
        self.A_log, self.dt_bias = decay_parameters(heads, heads)
        self.D = declared(Constant(1), heads)
        self.norm = declared(Constant(1), self.value_dim)
        self.norm_eps = model.norm_eps

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        C, B, values = self.project(x, shard, cache)
        dt = F.softplus(full(self.dt(x)) + full(self.dt_bias))
        decay = -full(self.A_log).exp() * dt
        taken = values * dt.unsqueeze(-1).to(values.dtype)  # (1, t, H) -> (1, t, H, 1)
        gate = Later(self.gate, x)
        y = recur(C, B, taken, decay, None, shard, cache, scale=1.0, meanwhile=gate)
        y = (y + self.D.unsqueeze(-1) * values).flatten(-2) * F.silu(gate.value)
        # A norm for each group of heads: (1, t, H · D) -> (1, t, groups, H / groups · D)
        normed = kernels.rms_norm(y.unflatten(-1, (self.heads, -1)), None, eps=self.norm_eps)
        return self.out(normed.flatten(-2) * self.norm)
