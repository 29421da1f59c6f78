"""Settings of the model. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.settings import ConfigError, setting


@dataclass
class ModelConfig:
    pattern: list[str] = setting(
        ["gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"],
        "mixers of the blocks from the first on, repeated over the depth",
    )
    layers: int = setting(4, "number of blocks")
    dim: int = setting(256, "width of the residual stream")
    mlp_dim: int | None = setting(None, "width inside the SwiGLU MLP (null: 8/3 dim, up to 64s)")
    tie_embeddings: bool = setting(True, "one matrix for the embedding and the output head")
    init_std: float = setting(0.02, "standard deviation of the initial weights")
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm")
    z_loss: float = setting(0.0, "weight of logsumexp² of the logits in the loss")
    checkpoint_activations: bool = setting(
        False, "keep only each block's input for the backward pass, and compute the rest again"
    )
    mixers: dict[str, Any] = setting(
        {}, "settings of the mixers, by name, as in model.mixers.attention.window=512"
    )

    def __post_init__(self) -> None:
        for key in ("layers", "dim"):
            if getattr(self, key) < 1:
                raise ConfigError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
        if self.dim % 8:
            raise ConfigError(f"model.dim is {self.dim}; it must be a multiple of 8")
        if not self.pattern:
            raise ConfigError("model.pattern is empty; name at least one mixer")

    @property
    def blocks(self) -> list[str]:
        """The mixer's name of every block."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.layers)]
