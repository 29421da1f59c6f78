"""HGRN-2 (Qin et al. 2024, arXiv 2404.07904): HGRN's gates with a matrix state, k = 1 − a."""

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
    """S_t = Diag(a_t) S_{t−1} + (1 − a_t) v_tᵀ, o_t = S_tᵀ silu(q_t), a norm on o.

    The projection that makes k in other mixers makes the forget gate a here.
    """

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
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o.flatten(-2)))
