"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay a channel of k."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from data.settings import setting
from parallel import Shard
from train.model.config import MOST_WIDTH, ModelConfig
from train.model.mixers._parts import (
    ConvolvedHeads,
    LinearMixer,
    LowRank,
    by_head,
    decay_parameters,
    full,
    recur,
    unit_length,
)
from train.model.norm import RMSNorm


@dataclass
class Config(ConvolvedHeads):
    rank: int | None = setting(
        None, "rank of the projections to decay and gate (null: head_dim)", least=1, most=MOST_WIDTH
    )


class Mixer(LinearMixer):
    """Gated DeltaNet with a decay for each channel of k, and a sigmoid gate on the output."""

    delta = True

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        rank, decay_dim = config.rank or self.head_dim, self.value_heads * self.head_dim
        self.beta = nn.Linear(model.dim, self.value_heads, bias=False)
        self.decay = LowRank(model.dim, rank, decay_dim)
        self.gate = LowRank(model.dim, rank, self.value_dim)
        self.A_log, self.dt_bias = decay_parameters(self.value_heads, decay_dim)
        self.norm = RMSNorm(self.value_head_dim, model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        beta = full(self.beta(x)).sigmoid()
        step = F.softplus(full(self.decay(x)) + full(self.dt_bias))
        decay = -full(self.A_log).exp().unsqueeze(-1) * by_head(step, self.value_heads)
        o = recur(unit_length(q), unit_length(k), v, decay, beta, shard, cache)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o).flatten(-2) * self.gate(x).sigmoid())
