"""DeltaNet (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from data.settings import setting
from parallel import Shard
from train.model.config import ModelConfig
from train.model.linear import Linear
from train.model.mixers._parts import (
    ConvolvedHeads,
    Later,
    LinearMixer,
    by_head,
    full,
    recur,
    unit_length,
)
from train.model.norm import RMSNorm


@dataclass
class Config(ConvolvedHeads):
    negative_eigenvalues: bool = setting(False, "β in (0, 2), not (0, 1)")
    output_gate: bool = setting(False, "SiLU gate on the output, from the block's input")


class Mixer(LinearMixer):
    """The delta rule without decay, on keys of length 1."""

    delta = True
    kind = "deltanet"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.largest_beta = 2 if config.negative_eigenvalues else 1
        self.beta = nn.Linear(model.dim, self.value_heads, bias=False)
        self.gate = Linear(model.dim, self.value_dim, bias=False) if config.output_gate else None
        self.norm = RMSNorm(self.value_head_dim, model.norm_eps)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        beta = self.largest_beta * full(self.beta(x)).sigmoid()
        later = None if self.gate is None else Later(self.gate, x)
        o = recur(unit_length(q), unit_length(k), v, None, beta, shard, cache, meanwhile=later)
        gate = None if later is None else by_head(later.value, self.value_heads)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out(self.norm(o, gate).flatten(-2))
