"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a scalar decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
import parallel
from data.settings import ConfigError, setting
from kernels import flops
from parallel import Shard
from train.model import mixers


@dataclass
class Config:
    heads: int = setting(4, "heads of q and k")
    value_heads: int | None = setting(None, "heads of v, a multiple of heads (null: as many)")
    head_dim: int = setting(64, "width of a head of q and k")
    value_head_dim: int | None = setting(None, "width of a head of v (null: head_dim)")
    conv_size: int = setting(4, "tokens under the short convolution")

    def __post_init__(self) -> None:
        self.value_heads = self.value_heads or self.heads
        self.value_head_dim = self.value_head_dim or self.head_dim
        if self.value_heads % self.heads:
            raise ConfigError(
                f"value_heads is {self.value_heads}; it must be a multiple of heads, {self.heads}"
            )


def _unit_length(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6).to(x.dtype)


class Mixer(mixers.Mixer):
    """Projections, a short convolution, the recurrence, a gated norm."""

    def __init__(self, dim: int, config: Config, layer: int, layers: int) -> None:
        super().__init__(dim, config, layer, layers)
        self.heads, self.head_dim = config.heads, config.head_dim
        self.value_heads = config.value_heads or config.heads
        self.value_head_dim = config.value_head_dim or config.head_dim
        key_dim = self.heads * self.head_dim
        value_dim = self.value_heads * self.value_head_dim
        self.widths = [key_dim, key_dim, value_dim]

        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.gate = nn.Linear(dim, value_dim, bias=False)
        # β and the input-dependent part of the decay: a number each, a token and head.
        self.beta_decay = nn.Linear(dim, 2 * self.value_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.widths), config.conv_size))
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.norm = nn.Parameter(torch.ones(self.value_head_dim))
        self.out = nn.Linear(value_dim, dim, bias=False)

    def reset_parameters(self) -> None:
        """Mamba's ranges: decay rates up to 16, time steps log-uniform in [0.001, 0.1]."""
        bound = self.conv.shape[1] ** -0.5
        nn.init.uniform_(self.conv, -bound, bound)
        with torch.no_grad():
            self.A_log.uniform_(1e-3, 16).log_()
            dt = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
            # The inverse of softplus, so that softplus(dt_bias) is dt.
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        before = cache or {}
        qkv, halo = parallel.short_convolution(
            self.qkv(x),
            self.conv,
            shard,
            initial_state=before.get("conv"),
            output_final_state=cache is not None,
        )
        q, k, v = (
            part.unflatten(-1, (heads, -1))
            for part, heads in zip(
                qkv.split(self.widths, dim=-1),
                (self.heads, self.heads, self.value_heads),
                strict=True,
            )
        )
        beta, dt = self.beta_decay(x).float().chunk(2, dim=-1)
        decay = -self.A_log.float().exp() * F.softplus(dt + self.dt_bias.float())
        o, state = parallel.linear_attention(
            _unit_length(q),
            _unit_length(k),
            v,
            decay,
            beta.sigmoid(),
            shard,
            initial_state=before.get("state"),
            output_final_state=cache is not None,
        )
        if cache is not None and halo is not None and state is not None:
            cache.update(conv=halo, state=state)
        gate = self.gate(x).unflatten(-1, (self.value_heads, -1))
        return self.out(kernels.rms_norm(o, self.norm, gate=gate).reshape(batch, tokens, -1))

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        return flops.linear_attention(
            lengths, self.value_heads, self.head_dim, self.value_head_dim, delta=True
        )
