"""Settings of the model. Imports no torch, so that a config is read and checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.settings import ConfigError, setting
from data.values import number

# What nobody has come near, and a slip of the finger soon passes.
MOST_LAYERS, MOST_WIDTH = 1024, 1 << 20
MOST_HEADS, MOST_HEAD_DIM = 1 << 14, 1 << 14
MOST_INNER = 1 << 24  # width inside an MLP
MOST_TAPS = 1 << 12  # of a short convolution
LEAST_EPS = 1e-30  # its root is a number in fp32, so that rows of zeros can be divided by it


@dataclass
class ModelConfig:
    pattern: list[str] = setting(
        ["gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"],
        "mixers of the blocks from the first on, repeated over the depth; gla*3 is three of them",
    )
    layers: int = setting(4, "number of blocks", least=1, most=MOST_LAYERS)
    dim: int = setting(256, "width of the residual stream", least=8, most=MOST_WIDTH)
    mlp_dim: int | None = setting(
        None,
        "width inside the MLP of a block (null: 8/3 dim for swiglu, 4 dim for others, up to 64s)",
        least=1,
        most=MOST_INNER,
    )
    mlp_pattern: list[str] = setting(
        ["swiglu"],
        "MLPs of the blocks from the first on, repeated over the depth; experts*3 is three of them",
    )
    mlp_first: list[str] = setting(
        [], "MLPs of the first blocks, in place of what mlp_pattern has there"
    )
    tie_embeddings: bool = setting(True, "one matrix for the embedding and the output head")
    init_std: float = setting(0.02, "standard deviation of the initial weights", least=0, most=1e3)
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm", least=LEAST_EPS, most=1)
    zero_centered_norms: bool = setting(
        False, "norms of blocks, of q and k, and the last scale by 1 + weight, as in Qwen3-Next"
    )
    post_norm: list[str] = setting(
        [], "mixers whose blocks norm what mixer and MLP give, not what they take, as in OLMo 2"
    )
    mup_base_dim: int | None = setting(
        None,
        "μP: width at which lr and init_std were tuned; both follow dim from there (null: no)",
        least=1,
        most=MOST_WIDTH,
    )
    z_loss: float = setting(
        0.0, "weight of logsumexp² of the logits in the loss", least=0, most=1e6
    )
    max_positions: int | None = setting(
        None,
        "longest sequence that imported weights were trained on; `export` says it again",
        least=1,
    )
    checkpoint_activations: bool = setting(
        False, "keep only each block's input for the backward pass, and compute the rest again"
    )
    mixers: dict[str, Any] = setting(
        {}, "settings of the mixers, by name, as in model.mixers.attention.window=512"
    )
    mlps: dict[str, Any] = setting(
        {}, "settings of the MLPs, by name, as in model.mlps.experts.chosen=4"
    )

    def __post_init__(self) -> None:
        if self.dim % 8:
            raise ConfigError(f"model.dim is {self.dim}; it must be a multiple of 8")
        if not self.pattern:
            raise ConfigError("model.pattern is empty; name at least one mixer")
        if not self.mlp_pattern:
            raise ConfigError("model.mlp_pattern is empty; name at least one MLP, or none")
        self.pattern = expanded(self.pattern)
        self.mlp_pattern = expanded(self.mlp_pattern, "mlp_pattern", "MLPs")
        self.mlp_first = expanded(self.mlp_first, "mlp_first", "MLPs")
        if len(self.mlp_first) > self.layers:
            raise ConfigError(
                f"model.mlp_first names {len(self.mlp_first)} MLPs; model.layers is {self.layers}"
            )

    @property
    def blocks(self) -> list[str]:
        """The name of each block's mixer, first block first."""
        return [self.pattern[i % len(self.pattern)] for i in range(self.layers)]

    @property
    def mlp_blocks(self) -> list[str]:
        """The name of each block's MLP, first block first."""
        repeated = [self.mlp_pattern[i % len(self.mlp_pattern)] for i in range(self.layers)]
        return self.mlp_first + repeated[len(self.mlp_first) :]

    @property
    def block_kinds(self) -> list[str]:
        """What to call each block: by its mixer, and by its MLP too where MLPs differ."""
        if len(set(self.mlp_blocks)) == 1:
            return self.blocks
        return [f"{a} + {b}" for a, b in zip(self.blocks, self.mlp_blocks, strict=True)]


def expanded(pattern: list[str], key: str = "pattern", what: str = "mixers") -> list[str]:
    """What a pattern stands for: `gla*3` for three times gla.

    Args:
        key, what: of the settings that hold it, and what it names, for errors.
    """
    names: list[str] = []
    for entry in pattern:
        name, star, times = entry.partition("*")
        count = number(times.strip()) if star else 1
        if not isinstance(count, int) or count < 1:
            raise ConfigError(
                f"model.{key} has {entry!r}; after the * a whole number above 0 says how many"
            )
        if len(names) + count > MOST_LAYERS:
            raise ConfigError(
                f"model.{key} has {entry!r}; it may name at most {MOST_LAYERS} {what}"
            )
        names += [name.strip()] * count
    return names
