"""HGRN (Qin et al. 2023, arXiv 2311.04823): an element-wise gated recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

import parallel
from data.settings import setting
from parallel import Shard
from train.model import mixers
from train.model.config import MOST_WIDTH, ModelConfig
from train.model.linear import Linear
from train.model.mixers._parts import BoundedForgetGate, Later
from train.model.norm import RMSNorm


@dataclass
class Config:
    state_dim: int | None = setting(
        None, "channels of the recurrence (null: model.dim)", least=1, most=MOST_WIDTH
    )


class Mixer(mixers.Mixer):
    """h_t = a_t h_{t−1} + (1 − a_t) silu(i_t), element-wise, and a gated norm on h."""

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        self.state_dim = config.state_dim or model.dim
        self.input_forget = nn.Linear(model.dim, 2 * self.state_dim, bias=False)
        self.gate = Linear(model.dim, self.state_dim, bias=False)
        self.forget = BoundedForgetGate(self.state_dim, layer, model.layers)
        self.norm = RMSNorm(self.state_dim, model.norm_eps)
        self.out = nn.Linear(self.state_dim, model.dim, bias=False)

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        gate = Later(self.gate, x)
        i, f = self.input_forget(x).chunk(2, dim=-1)
        log_a, rest = self.forget(f)
        h, state = parallel.diagonal_scan(
            (F.silu(i) * rest).to(x.dtype),
            log_a,
            shard,
            initial_state=None if cache is None else cache.get("state"),
            output_final_state=cache is not None,
            meanwhile=gate,
        )
        if cache is not None and state is not None:
            cache["state"] = state
        return self.out(self.norm(h, gate.value))

    def mixing_flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        return 2.0 * sum(lengths) * self.state_dim  # a multiply-add a channel
