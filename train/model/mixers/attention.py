"""Softmax attention: grouped query heads, rotary or none, q/k norm, output gate, window."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import kernels
import parallel
from data.settings import ConfigError, setting
from kernels import flops
from parallel import Shard, Waves
from train.model import mixers
from train.model.config import MOST_HEAD_DIM, MOST_HEADS, MOST_TAPS, ModelConfig
from train.model.linear import InParts, Linear, Run
from train.model.mixers._parts import convolved, short_filters
from train.model.norm import RMSNorm


@dataclass
class Projections:
    heads: int = setting(4, "query heads", least=1, most=MOST_HEADS)
    kv_heads: int | None = setting(
        None, "key and value heads, a divisor of heads (null: heads)", least=1, most=MOST_HEADS
    )
    head_dim: int = setting(64, "width of a head", least=1, most=MOST_HEAD_DIM)
    rotary_fraction: float = setting(
        1.0, "share of a head that rotary embedding turns; 0 for none", least=0, most=1
    )
    rotary_theta: float = setting(10000.0, "base of the rotary wavelengths", above=0, most=1e15)
    qk_norm: bool = setting(True, "RMSNorm on q and k")
    qk_norm_over: Literal["head", "heads"] = setting(
        "head", "what that norm covers: each head by itself, or all together as in OLMo 2"
    )
    qkv_bias: bool = setting(False, "biases on the projections to q, k and v, as in Qwen2")
    output_gate: bool = setting(True, "sigmoid gate on the output, from the block's input")

    def __post_init__(self) -> None:
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads is {self.kv_heads}; it must be a divisor of heads, {self.heads}"
            )


@dataclass
class Config(Projections):
    window: int | None = setting(
        None, "tokens that a token sees, itself included (null: all)", least=1
    )
    conv_size: int = setting(
        0, "tokens under a short convolution over q, k and v; 0 for none", least=0, most=MOST_TAPS
    )


class ProjectedMixer(mixers.Mixer):
    """The projections of softmax attention, with or without the softmax between them."""

    def __init__(self, model: ModelConfig, config: Projections, layer: int) -> None:
        super().__init__(model, config, layer)
        self.heads, self.head_dim = config.heads, config.head_dim
        self.kv_heads = config.kv_heads or config.heads
        # Rotary turns pairs, so an even number of dimensions.
        pairs = round(config.rotary_fraction * config.head_dim / 2)
        self.rotary_dim = 2 * min(pairs, config.head_dim // 2)
        self.rotary_theta = config.rotary_theta
        query_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = [query_dim, kv_dim, kv_dim]

        self.qkv = Linear(model.dim, sum(self.widths), bias=config.qkv_bias)
        self.gate = nn.Linear(model.dim, query_dim, bias=False) if config.output_gate else None
        self.norm_over = config.qk_norm_over if config.qk_norm else None
        if self.norm_over is not None:
            over_head = self.norm_over == "head"
            self.q_norm, self.k_norm = (
                RMSNorm(
                    self.head_dim if over_head else width,
                    model.norm_eps,
                    model.zero_centered_norms,
                )
                for width in (query_dim, kv_dim)
            )
        self.out = Linear(query_dim, model.dim, bias=False)

    def project(self, x: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, t, dim) -> q (1, t, heads, D), k and v (1, t, kv_heads, D), normed and rotated."""
        q, k, v = self.project_unturned(x)
        return self.turn(q, shard), self.turn(k, shard), v

    def project_unturned(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, without rotary embedding."""
        return self.by_head(self.qkv(x))

    def by_head(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, t, (heads + 2 · kv_heads) · D) -> q, k and v by head, normed."""
        q, k, v = qkv.split(self.widths, dim=-1)
        return self.normed(q, k, v)

    def normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, t, heads · D) each -> (1, t, heads, D), q and k normed.

        These may be some of the heads only, unless the norm is over all heads.
        """
        if self.norm_over == "heads":
            q, k = self.q_norm(q), self.k_norm(k)
        # (1, t, heads · D) -> (1, t, heads, D)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def turn(self, head: Tensor, shard: Shard) -> Tensor:
        """Rotary embedding of (1, t, heads, D), on the first `rotary_dim` channels."""
        if not self.rotary_dim:
            return head
        return kernels.rotary_embedding(
            head, shard.positions, theta=self.rotary_theta, rotary_dim=self.rotary_dim
        )

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o (1, t, heads, D) -> (1, t, dim): gated by x, the block's input, and projected."""
        o = o.flatten(-2)  # (1, t, heads, D) -> (1, t, heads · D)
        if self.gate is not None:
            o = o * self.gate(x).sigmoid()
        return self.out(o)


class Mixer(ProjectedMixer):
    """Causal attention within each sequence."""

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.window = config.window
        self.conv = short_filters(sum(self.widths), config.conv_size)

    @property
    def by_wave(self) -> bool:
        """Whether q, k and v of some heads can be computed without the other heads."""
        return self.conv is None and self.norm_over != "heads"

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        if self.by_wave and cache is None:
            return self._in_waves(x, shard)
        q, k, v = self.by_head(convolved(self.qkv(x), self.conv, None, shard, cache))
        q, k = self.turn(q, shard), self.turn(k, shard)
        return self.finish(attend(q, k, v, shard, cache, self.window), x)

    def _in_waves(self, x: Tensor, shard: Shard) -> Tensor:
        """Project and send one wave of heads after the other, then receive and project back."""
        attention = parallel.SoftmaxAttention(shard, self.heads, self.kv_heads, self.window)
        qkv = InParts(self.qkv, len(attention.leaving))
        out = InParts(self.out, len(attention.arriving))
        for waves in attention.leaving:
            q, k, v = self.normed(*qkv.rows(x, self._rows(waves)))
            attention.send(waves, self.turn(q, shard), self.turn(k, shard), v)
        columns = [self._channels(waves, self.heads) for waves in attention.arriving]
        gates: Sequence[Tensor | None] = [None] * len(columns)
        if self.gate is not None:  # while q, k and v travel
            gates = self.gate(x).sigmoid().split([b - a for a, b in columns], dim=-1)
        y = None
        for waves, run, gate in zip(attention.arriving, columns, gates, strict=True):
            o = attention.receive(waves).flatten(-2)  # (1, t, h, D) -> (1, t, h · D)
            y = out.columns(o if gate is None else o * gate, run, y)
        assert y is not None  # a layer has a wave of heads
        return y

    def _rows(self, waves: Waves) -> list[Run]:
        """Rows of `qkv` that compute the waves' q, k and v."""
        begins = itertools.accumulate(self.widths, initial=0)
        runs = (self._channels(waves, heads) for heads in (self.heads, *[self.kv_heads] * 2))
        return [(begin + a, begin + b) for begin, (a, b) in zip(begins, runs, strict=False)]

    def _channels(self, waves: Waves, heads: int) -> Run:
        first, end = waves.share(heads)
        return first * self.head_dim, end * self.head_dim

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        return flops.softmax_attention(
            lengths, self.heads, self.head_dim, self.head_dim, self.window
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: Shard,
    cache: dict[str, Tensor] | None,
    window: int | None,
) -> Tensor:
    """o (1, t, heads, D) of softmax attention; with a cache also to the keys and values in it."""
    cu_seqlens_k = None
    if cache is not None:
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], dim=1), torch.cat([cache["v"], v], dim=1)
        # Keys before every later token's window are dropped.
        kept = 0 if window is None else max(0, k.shape[1] - window + 1)
        cache.update(k=k[:, kept:], v=v[:, kept:])
        cu_seqlens_k = torch.tensor([0, k.shape[1]], dtype=torch.int32, device=k.device)
    return parallel.softmax_attention(q, k, v, shard, window=window, cu_seqlens_k=cu_seqlens_k)
