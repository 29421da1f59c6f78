"""LightNet (Qin et al. 2024, arXiv 2405.21022): an additive recurrence made multiplicative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import parallel
from data.settings import setting
from parallel import Shard
from train.model.config import MOST_WIDTH, ModelConfig
from train.model.mixers._parts import (
    Heads,
    LinearMixer,
    LowRank,
    by_head,
    full,
    recur,
    repeat_heads,
)
from train.model.norm import RMSNorm

# Logits of k are clamped to ± this: a sum of a million times e^40, 2·10²³, is far below fp32's
# largest number, 3·10³⁸.
LARGEST = 40.0


@dataclass
class Config(Heads):
    gate_rank: int = setting(
        128, "rank of the projection to the output's gate", least=1, most=MOST_WIDTH
    )


class Mixer(LinearMixer):
    """k_t = exp(l_t − z_t) and log a_t = z_{t−1} − z_t, where z_t = log Σ_{s ≤ t} exp(l_s).

    So k = 1 − a: keys are weights of a softmax over the tokens so far.
    """

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.gate = LowRank(model.dim, config.gate_rank, self.value_dim)
        self.norm = RMSNorm(self.value_dim, model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, logits, v = self.project(x, shard, cache)
        new = full(logits.flatten(-2)).clamp(-LARGEST, LARGEST).exp()
        total, sums = parallel.diagonal_scan(
            new,
            torch.zeros_like(new),
            shard,
            initial_state=None if cache is None else cache.get("sums"),
            output_final_state=cache is not None,
        )
        if cache is not None and sums is not None:
            cache["sums"] = sums
        # The decay is computed from the ratio: z_{t−1} − z_t as a difference would soon be
        # rounded to 0. At a sequence's first token the ratio is 1 and the decay −∞; no state
        # enters there, so the ratio is clamped and any finite decay does.
        k = (new / total).clamp_max(1 - torch.finfo(new.dtype).eps)
        k = by_head(k, self.heads)
        decay = repeat_heads(torch.log1p(-k), self.value_heads // self.heads)
        o = recur(F.silu(q), k.to(q.dtype), v, decay, None, shard, cache)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o.flatten(-2), self.gate(x)))
