"""TransNormer (Qin et al. 2022, arXiv 2210.10340): attention in blocks, then NormAttention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.settings import setting
from kernels import flops
from parallel import Shard
from train.model.config import MOST_HEAD_DIM, MOST_HEADS, ModelConfig
from train.model.mixers._parts import Heads, LinearMixer, recur
from train.model.mixers.attention import attend
from train.model.norm import RMSNorm

# Scores of pairs in different blocks are lowered by twice this against those of pairs in one block,
# and their weights by a factor of e^−120.
APART = 60.0
MARKED = 8  # channels that do it: so many, since flash kernels want widths that are multiples of 8


@dataclass
class Config:
    heads: int = setting(4, "heads", least=1, most=MOST_HEADS)
    head_dim: int = setting(64, "width of a head", least=1, most=MOST_HEAD_DIM)
    diagonal: float = setting(
        0.5, "share of the layers, from the first on, with DiagAttention", least=0, most=1
    )
    block: int = setting(64, "DiagAttention: tokens of a block", least=1)


class Mixer(LinearMixer):
    """Early layers: softmax attention inside blocks of each sequence (DiagAttention).

    Later ones: o_t = norm(S_tᵀ φ(q_t)), S_t = S_{t−1} + φ(k_t) v_tᵀ, φ = 1 + elu
    (NormAttention).
    """

    kind = "linear"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, Heads(config.heads, None, config.head_dim), layer)
        self.block = config.block if layer < round(config.diagonal * model.layers) else None
        self.norm = RMSNorm(self.value_dim, model.norm_eps) if self.block is None else None
        if self.block is not None:
            self.recurrent = None

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        if self.norm is None:
            return self.out(self._within_blocks(q, k, v, shard, cache).flatten(-2))
        o = recur(F.elu(q) + 1, F.elu(k) + 1, v, None, None, shard, cache)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o.flatten(-2)))

    def _within_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, shard: Shard, cache: dict[str, Tensor] | None
    ) -> Tensor:
        """Attention inside blocks of `block` tokens, as a window of that width.

        A window reaches into at most one earlier block. To mask that one, q and k get channels that
        are +1 in every other block and −1 in the rest. So blocks need no more exchange between
        ranks than a window.
        """
        assert self.block is not None
        width = self.head_dim + MARKED
        mark = 1.0 - 2.0 * (shard.positions // self.block % 2)
        # (t,) -> (1, t, H, MARKED)
        mark = mark.to(q.dtype)[:, None, None].expand(*q.shape[1:3], MARKED).unsqueeze(0)
        # `attend` divides scores by √width; ours should be divided by √head_dim.
        size = math.sqrt(APART * math.sqrt(width) / MARKED)
        q = torch.cat([q * math.sqrt(width / self.head_dim), size * mark], dim=-1)
        k = torch.cat([k, size * mark], dim=-1)
        o = attend(q, k, F.pad(v, (0, MARKED)), shard, cache, self.block)
        return o[..., : self.head_dim]

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        if self.block is None:
            return super().mixing_flops(lengths)
        n = np.asarray(lengths)
        blocks = [*[self.block] * int((n // self.block).sum()), *(n % self.block)]
        return flops.softmax_attention(blocks, self.heads, self.head_dim, self.head_dim)
