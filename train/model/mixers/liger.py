"""Liger (Lan et al. 2025, arXiv 2503.01496): a pretrained attention layer as a gated recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from data.settings import ConfigError, setting
from kernels import flops
from parallel import Shard
from parallel.planning.clusters import Recurrent
from train.model.config import ModelConfig
from train.model.mixers._parts import full, recur, repeat_heads
from train.model.mixers.attention import ProjectedMixer, Projections, attend


@dataclass
class Config(Projections):
    """The settings of the attention layer that it is made from, and its own."""

    window: int = setting(64, "tokens that the softmax half sees, itself included", least=1)
    gate_pool: int = setting(1, "channels of a key head that one gate is the mean of", least=1)
    gate_normalizer: float = setting(
        16.0, "what the logarithm of the gates is divided by", least=1e-3, most=1e6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % self.gate_pool:
            raise ConfigError(
                f"gate_pool is {self.gate_pool}; it must be a divisor of head_dim, {self.head_dim}"
            )


class Mixer(ProjectedMixer):
    """o = ½ GLA(softmax(q), softmax(k), v, a) + ½ softmax attention in a window.

    log a = log σ(pooled k) / 16: the gates are computed from the keys, so that it has only the
    parameters of the attention layer. Only the window's half has rotary embedding.
    """

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.recurrent = Recurrent("gla", self.heads, self.head_dim, self.head_dim)
        self.window, self.pool = config.window, config.gate_pool
        self.normalizer = config.gate_normalizer

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project_unturned(x)
        near = attend(self.turn(q, shard), self.turn(k, shard), v, shard, cache, self.window)
        # (1, t, kv_heads, D) -> (1, t, kv_heads, D / pool) -> (1, t, kv_heads, D)
        pooled = full(k).unflatten(-1, (-1, self.pool)).mean(-1)
        decay = F.logsigmoid(pooled).repeat_interleave(self.pool, dim=-1) / self.normalizer
        k, v, decay = (
            repeat_heads(part, self.heads // self.kv_heads) for part in (k.softmax(-1), v, decay)
        )
        far = recur(q.softmax(-1), k, v, decay, None, shard, cache, scale=1.0)
        return self.finish((far + near) / 2, x)

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        width = self.head_dim
        near = flops.softmax_attention(lengths, self.heads, width, width, self.window)
        return near + flops.linear_attention(lengths, self.heads, width, width, delta=False)
