"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a scalar decay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from data.settings import setting
from parallel import Shard
from train.model.config import LEAST_EPS, ModelConfig
from train.model.linear import Linear
from train.model.mixers._parts import (
    ConvolvedHeads,
    Later,
    LinearMixer,
    by_head,
    decay_parameters,
    full,
    recur,
    unit_length,
)
from train.model.norm import RMSNorm


@dataclass
class Config(ConvolvedHeads):
    negative_eigenvalues: bool = setting(False, "β in (0, 2), not (0, 1), as in OLMo Hybrid")
    norm_eps: float | None = setting(
        None, "epsilon of the output's norm (null: model.norm_eps)", least=LEAST_EPS, most=1
    )


class Mixer(LinearMixer):
    """S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, keys of length 1, a gated norm on o.

    log a_t = −exp(A_log) · softplus(dt_t + dt_bias), one a token and head.
    """

    delta = True
    kind = "gated_deltanet"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.largest_beta = 2 if config.negative_eigenvalues else 1
        self.gate = Linear(model.dim, self.value_dim, bias=False)
        # (…, dim) -> (…, 2 · Hv): β, and the part of the decay that depends on the token.
        self.beta_decay = nn.Linear(model.dim, 2 * self.value_heads, bias=False)
        self.A_log, self.dt_bias = decay_parameters(
            self.value_heads, self.value_heads, slowest=1e-3
        )
        self.norm = RMSNorm(self.value_head_dim, config.norm_eps or model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        beta, dt = full(self.beta_decay(x)).chunk(2, dim=-1)
        decay = -full(self.A_log).exp() * F.softplus(dt + full(self.dt_bias))
        beta = self.largest_beta * beta.sigmoid()
        gate = Later(self.gate, x)
        o = recur(unit_length(q), unit_length(k), v, decay, beta, shard, cache, meanwhile=gate)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o, by_head(gate.value, self.value_heads)).flatten(-2))
