"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): no decay, a feature map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data.settings import ConfigError, setting
from parallel import Shard
from train.model.config import ModelConfig
from train.model.mixers._parts import Heads, LinearMixer, average, recur
from train.model.norm import RMSNorm

# "elu", "relu" and "softmax" are never negative, as output_norm=sum needs.
FEATURE_MAPS = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": torch.relu,
    "softmax": lambda x: x.softmax(-1),
    "silu": F.silu,
    "identity": lambda x: x,
}


@dataclass
class Config(Heads):
    feature_map: Literal["elu", "relu", "softmax", "silu", "identity"] = setting(
        "elu", "what makes features of q and k; elu is 1 + elu(x), softmax runs over a head"
    )
    output_norm: Literal["rms", "sum", "none"] = setting(
        "rms", "RMSNorm a head; or divide by the sum of the weights, as softmax attention does"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_norm == "sum" and self.feature_map in ("silu", "identity"):
            raise ConfigError(
                f"output_norm is sum, but features of {self.feature_map} may be negative and sum "
                "to 0; take output_norm=rms, or feature_map elu, relu or softmax"
            )


class Mixer(LinearMixer):
    """S_t = S_{t−1} + φ(k_t) v_tᵀ, o_t = norm(S_tᵀ φ(q_t))."""

    kind = "linear"

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.feature_map = FEATURE_MAPS[config.feature_map]
        self.average_values = config.output_norm == "sum"
        self.norm = (
            RMSNorm(self.value_head_dim, model.norm_eps) if config.output_norm == "rms" else None
        )

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x, shard, cache)
        q, k = self.feature_map(q), self.feature_map(k)
        if self.average_values:
            o = average(q, k, v, shard, cache)
        else:
            o = recur(q, k, v, None, None, shard, cache)
        # (1, t, Hv, Dv) -> (1, t, Hv · Dv) -> (1, t, dim)
        return self.out((o if self.norm is None else self.norm(o)).flatten(-2))
