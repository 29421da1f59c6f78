"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a decay a channel of k."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from data.settings import setting
from parallel import Shard
from train.model.config import MOST_WIDTH, ModelConfig
from train.model.linear import Linear
from train.model.mixers._parts import Heads, Later, LinearMixer, LowRank, by_head, full, recur
from train.model.norm import RMSNorm


@dataclass
class Config(Heads):
    gate_rank: int = setting(16, "rank of the projection to the decay", least=1, most=MOST_WIDTH)
    gate_divisor: float = setting(
        16.0, "a = σ(…) to the power of 1 / gate_divisor", least=1e-3, most=1e6
    )


class Mixer(LinearMixer):
    """log a = logsigmoid(W₂ W₁ x + b) / 16, and a gated norm on the output."""

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.gate_divisor = config.gate_divisor
        decay_dim = self.value_heads * self.head_dim
        self.decay = LowRank(model.dim, config.gate_rank, decay_dim, bias=True)
        self.gate = Linear(model.dim, self.value_dim, bias=False)
        self.norm = RMSNorm(self.value_head_dim, model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        decay = F.logsigmoid(full(by_head(self.decay(x), self.value_heads))) / self.gate_divisor
        gate = Later(self.gate, x)
        o = recur(q, k, v, decay, None, shard, cache, meanwhile=gate)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o, by_head(gate.value, self.value_heads)).flatten(-2))
