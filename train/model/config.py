"""Settings of the model. Imports no torch, so that a config is read and checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.settings import ConfigError, setting


@dataclass
class ModelConfig:
    pattern: list[str] = setting(
        ["gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"],
        "mixers of the blocks from the first on, repeated over the depth; gla*3 is three of them",
    )
    layers: int = setting(4, "number of blocks")
    dim: int = setting(256, "width of the residual stream")
    mlp_dim: int | None = setting(None, "width inside the SwiGLU MLP (null: 8/3 dim, up to 64s)")
    tie_embeddings: bool = setting(True, "one matrix for the embedding and the output head")
    init_std: float = setting(0.02, "standard deviation of the initial weights")
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm")
    zero_centered_norms: bool = setting(
        False, "norms of blocks, of q and k, and the last scale by 1 + weight, as in Qwen3-Next"
    )
    post_norm: list[str] = setting(
        [], "mixers whose blocks norm what mixer and MLP give, not what they take, as in OLMo 2"
    )
    mup_base_dim: int | None = setting(
        None, "μP: width at which lr and init_std were tuned; both follow dim from there (null: no)"
    )
    z_loss: float = setting(0.0, "weight of logsumexp² of the logits in the loss")
    max_positions: int | None = setting(
        None, "longest sequence that imported weights were trained on; `export` says it again"
    )
    checkpoint_activations: bool = setting(
        False, "keep only each block's input for the backward pass, and compute the rest again"
    )
    mixers: dict[str, Any] = setting(
        {}, "settings of the mixers, by name, as in model.mixers.attention.window=512"
    )

    def __post_init__(self) -> None:
        require_positive(
            self, "layers", "dim", "mlp_dim", "mup_base_dim", "max_positions", prefix="model."
        )
        if self.dim % 8:
            raise ConfigError(f"model.dim is {self.dim}; it must be a multiple of 8")
        if not self.pattern:
            raise ConfigError("model.pattern is empty; name at least one mixer")
        self.pattern = expanded(self.pattern)

    @property
    def blocks(self) -> list[str]:
        """The name of each block's mixer, first block first."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.layers)]


def expanded(pattern: list[str]) -> list[str]:
    """The mixers that a pattern stands for: `gla*3` for three times gla."""
    names = []
    for entry in pattern:
        name, star, times = entry.partition("*")
        if star and not (times.strip().isdecimal() and int(times) > 0):
            raise ConfigError(
                f"model.pattern has {entry!r}; after the * a whole number above 0 says how many"
            )
        names += [name.strip()] * int(times or 1)
    return names


def require_positive(config: object, *keys: str, prefix: str = "") -> None:
    """Raises ConfigError for the first of these settings that is given and below 1."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ConfigError(f"{prefix}{key} is {value}; it must be at least 1")
