"""Hedgehog (Zhang et al. 2024, arXiv 2402.04347): learned features that mimic softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import flops
from parallel import Shard
from parallel.planning.clusters import Recurrent
from train.model.config import ModelConfig
from train.model.initial import Identity, declared
from train.model.mixers._parts import average, repeat_heads
from train.model.mixers.attention import ProjectedMixer, Projections


@dataclass
class Config(Projections):
    """The settings of the attention layer that it replaces."""


class Mixer(ProjectedMixer):
    """o_i = Σ_j w_ij v_j / Σ_j w_ij, w_ij = ⟨φ_q(q_i), φ_k(k_j)⟩, φ(x) = softmax([2Wx, −2Wx]).

    Its projections are those of attention, so that a pretrained attention layer can be converted.
    W, a matrix (D, D) for each head that starts as the identity, is what distillation learns.
    """

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.recurrent = Recurrent("linear", self.heads, 2 * self.head_dim, self.head_dim + 1)
        maps = self.heads, self.head_dim, self.head_dim
        self.q_map = declared(Identity(self.head_dim), *maps)
        self.k_map = declared(Identity(self.head_dim), *maps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard)
        k, v = (repeat_heads(part, self.heads // self.kv_heads) for part in (k, v))
        q, k = features(q, self.q_map), features(k, self.k_map)
        return self.finish(average(q, k, v, shard, cache), x)

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        return flops.linear_attention(
            lengths, self.heads, 2 * self.head_dim, self.head_dim + 1, delta=False
        )


def features(x: Tensor, weight: Tensor) -> Tensor:
    """φ: x (…, heads, D) -> (…, heads, 2 · D), positive with sum 1, for a weight (heads, D, D)."""
    y = 2 * torch.einsum("...hi,hoi->...ho", x, weight)
    return torch.cat([y, -y], dim=-1).softmax(-1)
