"""Softmax attention: grouped query heads, rotary or none, q/k norm, output gate, window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import kernels
import parallel
from data.settings import ConfigError, setting
from kernels import flops
from parallel import Shard
from train.model import mixers


@dataclass
class Config:
    heads: int = setting(4, "query heads")
    kv_heads: int | None = setting(None, "key and value heads, a divisor of heads (null: heads)")
    head_dim: int = setting(64, "width of a head")
    rotary_fraction: float = setting(1.0, "share of a head that rotary embedding turns; 0 for none")
    rotary_theta: float = setting(10000.0, "base of the rotary wavelengths")
    qk_norm: bool = setting(True, "RMSNorm on each head of q and k")
    output_gate: bool = setting(True, "sigmoid gate on the output, from the block's input")
    window: int | None = setting(None, "tokens that a token sees, itself included (null: all)")

    def __post_init__(self) -> None:
        self.kv_heads = self.kv_heads or self.heads
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads is {self.kv_heads}; it must be a divisor of heads, {self.heads}"
            )
        if not 0 <= self.rotary_fraction <= 1:
            raise ConfigError(f"rotary_fraction is {self.rotary_fraction}; it must be in [0, 1]")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window is {self.window}; it must be at least 1, or null")


class Mixer(mixers.Mixer):
    """Causal attention within each sequence."""

    def __init__(self, dim: int, config: Config, layer: int, layers: int) -> None:
        super().__init__(dim, config, layer, layers)
        self.heads, self.head_dim = config.heads, config.head_dim
        self.kv_heads = config.kv_heads or config.heads
        # Rotary turns pairs, so an even number of dimensions.
        self.rotary_dim = 2 * round(config.rotary_fraction * config.head_dim / 2)
        self.rotary_theta, self.window = config.rotary_theta, config.window
        query_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = [query_dim, kv_dim, kv_dim]

        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.gate = nn.Linear(dim, query_dim, bias=False) if config.output_gate else None
        self.q_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.out = nn.Linear(query_dim, dim, bias=False)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = kernels.rms_norm(q, self.q_norm), kernels.rms_norm(k, self.k_norm)
        if self.rotary_dim:
            q, k = (
                kernels.rotary_embedding(
                    head, shard.positions, theta=self.rotary_theta, rotary_dim=self.rotary_dim
                )
                for head in (q, k)
            )
        cu_seqlens_k = None
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], dim=1), torch.cat([cache["v"], v], dim=1)
            # What a window has passed by is never seen again.
            kept = 0 if self.window is None else max(0, k.shape[1] - self.window + 1)
            cache.update(k=k[:, kept:], v=v[:, kept:])
            cu_seqlens_k = torch.tensor([0, k.shape[1]], dtype=torch.int32, device=k.device)
        o = parallel.softmax_attention(
            q, k, v, shard, window=self.window, cu_seqlens_k=cu_seqlens_k
        ).flatten(-2)
        if self.gate is not None:
            o = o * self.gate(x).sigmoid()
        return self.out(o)

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        return flops.softmax_attention(
            lengths, self.heads, self.head_dim, self.head_dim, self.window
        )
