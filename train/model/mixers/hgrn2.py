"""HGRN-2 (Qin et al. 2024, arXiv 2404.07904): a channel takes in as much as it forgets."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from parallel import Shard
from train.model.config import ModelConfig
from train.model.mixers._parts import (
    BoundedForgetGate,
    Heads,
    LinearMixer,
    by_head,
    recur,
    repeat_heads,
)
from train.model.norm import RMSNorm

Config = Heads


class Mixer(LinearMixer):
    """k = 1 − a and q = silu(…); what the others project to k is the forget gate."""

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.forget = BoundedForgetGate(self.heads * self.head_dim, layer, model.layers)
        self.norm = RMSNorm(self.value_dim, model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, f, v = self.project(x, shard, cache)
        log_a, rest = (by_head(part, self.heads) for part in self.forget(f.flatten(-2)))
        q, k = F.silu(q), rest.to(q.dtype)
        decay = repeat_heads(log_a, self.value_heads // self.heads)
        o = recur(q, k, v, decay, None, shard, cache)
        return self.out(self.norm(o.flatten(-2)))
