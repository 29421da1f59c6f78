"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): MLPs of which a token meets a few.

No expert has a capacity and no token is dropped, so what a token gets depends on that token alone.
Every rank has the weights of all experts, or gathers them under ZeRO 3, and applies them to its own
tokens; or a rank has the weights of some, and tokens' rows travel to them (`MLP.rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

import kernels
from data.settings import ConfigError, setting
from parallel.travel.rows import Rows
from train.model import mlps
from train.model.config import MOST_INNER, MOST_WIDTH, ModelConfig
from train.model.linear import Stacked
from train.model.mlps._parts import activated, width
from train.model.mlps._router import Router, Routing


@dataclass
class Config(Routing):
    dim: int | None = setting(
        None,
        "width inside an expert (null: model.mlp_dim / chosen, up to 8s)",
        least=1,
        most=MOST_INNER,
    )
    activation: Literal["swiglu", "relu2", "clamped_swiglu"] = setting(
        "swiglu", "kind of each expert, and of the shared one"
    )
    limit: float = setting(
        7.0, "clamped_swiglu: bound of the gate from above, of up on both sides", above=0, most=1e6
    )
    shared_dim: int = setting(
        0, "width of an expert that every token meets; 0 for none", least=0, most=MOST_INNER
    )
    shared_gate: bool = setting(False, "sigmoid gate on the shared expert, one number a token")
    latent: int = setting(
        0,
        "width of what experts take and give, projected from dim and to it; 0 for dim itself",
        least=0,
        most=MOST_WIDTH,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_gate and not self.shared_dim:
            raise ConfigError("shared_gate is true, but shared_dim is 0: there is no shared expert")

    @property
    def form(self) -> tuple[kernels.Activation, float | None]:
        """The activation, and its limit if it is clamped."""
        if self.activation == "relu2":
            return "relu2", None
        return "swiglu", self.limit if self.activation == "clamped_swiglu" else None


def hidden(model: ModelConfig, config: Config) -> int:
    """The width inside an expert."""
    return config.dim or 8 * -(-width(model, None, 8 / 3) // (8 * config.chosen))


class Shared(nn.Module):
    """The expert that every token meets: x (t, dim) -> (t, dim)."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        self.activation, self.limit = config.form
        wide = config.shared_dim * (1 if self.activation == "relu2" else 2)
        self.up = nn.Linear(dim, wide, bias=False)
        self.gate = nn.Linear(dim, 1, bias=False) if config.shared_gate else None
        self.out = nn.Linear(config.shared_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(activated(self.up(x), self.activation, self.limit))
        return y if self.gate is None else self.gate(x).sigmoid() * y


class Latent(nn.Module):
    """Projections to what experts take, and from what they give (Nemotron 3)."""

    def __init__(self, dim: int, latent: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, latent, bias=False)
        self.out = nn.Linear(latent, dim, bias=False)


class MLP(mlps.MLP):
    """y_t = Σ_e w_te · expert_e(x_t) + shared(x_t), over the experts e that the router chooses."""

    def __init__(self, model: ModelConfig, config: Config, layer: int) -> None:
        super().__init__(model, config, layer)
        inner = hidden(model, config)
        self.chosen, self.hidden, self.shared_dim = config.chosen, inner, config.shared_dim
        self.activation, self.limit = config.form
        taken = config.latent or model.dim
        wide = inner if self.activation == "relu2" else 2 * inner
        self.router = Router(model.dim, config)
        self.latent = Latent(model.dim, config.latent) if config.latent else None
        self.up = Stacked(config.experts, config.chosen, taken, wide)
        self.out = Stacked(config.experts, config.chosen, inner, taken)
        self.shared = Shared(model.dim, config) if config.shared_dim else None
        self.rows: Rows | None = None  # set where experts live on some ranks each (`train.experts`)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (1, t, dim) -> (t, dim)
        experts, weights = self.router(tokens)
        given = tokens if self.latent is None else self.latent.down(tokens)
        begun = self.rows and self.rows.begin(
            given, experts, weights, (self.up.weight, self.out.weight)
        )
        shared = None if self.shared is None else self.shared(tokens)  # while rows travel
        y = begun(self._applied) if begun else self._every(given, experts, weights)
        if self.latent is not None:
            y = self.latent.out(y)
        if shared is not None:
            y = y + shared
        return y.view_as(x)

    def _every(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x (t, D), experts and weights (t, chosen) -> the weighted sum of each token's experts."""
        told = kernels.by_expert(experts, weights, self.router.out_features)
        return self.up(
            x, lambda x, up: self.out(x, lambda x, out: self._applied(x, *told, up, out))
        )

    def _applied(
        self, x: Tensor, rows: Tensor, factors: Tensor, ends: Tensor, up: Tensor, out: Tensor
    ) -> Tensor:
        return kernels.expert_mlp(
            x, rows, factors, ends, up, out, activation=self.activation, limit=self.limit
        )

    @property
    def inner(self) -> int:
        parts = 3 if self.activation == "swiglu" else 2
        return parts * (self.chosen * self.hidden + self.shared_dim)
