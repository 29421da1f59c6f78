"""Models that the simulator knows: their sizes, and the FLOPs and bytes a token that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parallel.planning.clusters import (
    BF16,
    RECURRENCES,
    Cluster,
    LinearLayers,
    Recurrent,
    Work,
    projections,
    zero_bytes,
)
from parallel.planning.costs import Costs
from parallel.planning.described import mapping, numbers
from parallel.planning.planner import FullAttention

_TAPS = 4  # tokens under the short convolution of a linear layer


@dataclass(frozen=True)
class Model:
    """A decoder of SwiGLU blocks; one in `full_every` blocks has full attention.

    The other blocks have linear mixers with `heads` heads of `head_dim`, a short convolution and a
    gate on the output.

    Attributes:
        layers: number of blocks.
        dim, mlp_dim: width of the residual stream, and inside an MLP.
        heads, kv_heads, head_dim: of full attention.
        mixer: the linear mixers' recurrence, one of `clusters.RECURRENCES`.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    mlp_dim: int
    head_dim: int = 128
    vocab_size: int = 32000
    full_every: int = 1
    mixer: str = "gated_deltanet"

    @property
    def full_layers(self) -> int:
        return self.layers // self.full_every

    @property
    def linear_layers(self) -> int:
        return self.layers - self.full_layers

    @property
    def dense_flops(self) -> float:
        """FLOPs a token of one block's projections and MLP, forward."""
        each = projections(self.heads, self.kv_heads, self.head_dim, self.dim)
        return sum(each) + 6.0 * self.dim * self.mlp_dim

    @property
    def head_flops(self) -> float:
        """FLOPs a token of the output head, forward."""
        return 2 * self.dim * self.vocab_size

    @property
    def gate_flops(self) -> float:
        """FLOPs a token of the projection to one linear-attention mixer's gate, forward."""
        return 2.0 * self.dim * self.head_dim * self.heads

    @property
    def parameters(self) -> float:
        """Number of weights; embedding and output head are two matrices."""
        flops = self.layers * self.dense_flops + self.linear_layers * self.gate_flops
        return flops / 2 + 2.0 * self.dim * self.vocab_size

    @property
    def recurrence(self) -> Recurrent:
        """Of one linear layer."""
        return Recurrent(self.mixer, self.heads, self.head_dim, self.head_dim)

    @cached_property
    def work(self) -> Work:
        """All but full attention."""
        inner = self.heads * self.head_dim
        taken = inner + 2 * self.kv_heads * self.head_dim  # q, k and v
        # Two norms and two residuals, the MLP's activation, rotary or convolution, gate and norm.
        touched = 10 * self.dim + 3 * self.mlp_dim + 2 * taken + 3 * inner
        return Work(
            products=self.layers * self.dense_flops
            + self.head_flops
            + self.linear_layers * self.gate_flops,
            recurrences=(self.recurrence,) * self.linear_layers,
            touched=float(BF16 * self.layers * touched),
        )

    def known(self, zero: int = 1) -> FullAttention:
        """What the planner of training would be told of it, under a stage of ZeRO."""
        none = not self.full_layers
        layers = max(1, self.full_layers)
        linear = LinearLayers(
            self.linear_layers / layers,
            self.recurrence,
            self.gate_flops,
            float(BF16 * (_TAPS - 1) * 3 * self.heads * self.head_dim),
        )
        return FullAttention(
            heads=0 if none else self.heads,
            kv_heads=0 if none else self.kv_heads,
            head_dim=self.head_dim,
            dim=self.dim,
            number_bytes=BF16,
            alone=not self.linear_layers,
            layers=layers,
            linear=linear if self.linear_layers else None,
            work=self.work,
            zero_bytes=zero_bytes(self.parameters, BF16, zero),
        )

    @property
    def stream_bytes(self) -> float:
        """Bytes a token that one block keeps for the backward pass in the stream's layout.

        The block's input, two norms, the output of the mixer, and three tensors of the MLP.
        """
        return BF16 * (3 * self.dim + self.heads * self.head_dim + 3 * self.mlp_dim)

    @property
    def mixer_bytes(self) -> float:
        """Bytes a token that one mixer keeps in its own layout: q, k, v and o."""
        return BF16 * self.head_dim * (2 * self.heads + 2 * self.kv_heads)


def _llama(layers: int, dim: int, mlp_dim: int, **changes: Any) -> Model:
    given: dict[str, Any] = {"heads": dim // 128, "kv_heads": dim // 128, **changes}
    return Model(layers=layers, dim=dim, mlp_dim=mlp_dim, **given)


MODELS = {
    "llama-3b": _llama(26, 3200, 8640, heads=32, kv_heads=32, head_dim=100),
    "llama-7b": _llama(32, 4096, 11008),
    "llama-13b": _llama(40, 5120, 13824),
    "llama-30b": _llama(60, 6656, 17920),
    "llama-8b-gqa": _llama(32, 4096, 14336, kv_heads=8, vocab_size=128256),
    "hybrid-3b": _llama(28, 3072, 8192, full_every=4),
    "hybrid-7b": _llama(32, 4096, 11008, full_every=4),
    "hybrid-7b-gqa": _llama(32, 4096, 14336, kv_heads=8, full_every=4),
}


def load_model(name: str) -> Model:
    """The model with that name here, or described by the YAML file at that path.

    Raises:
        ValueError: neither exists, or a key or value of the file is wrong.
    """
    if name in MODELS:
        return MODELS[name]
    unknown = f"model is {name[:200]!r}; it must be one of {', '.join(MODELS)}"
    path = Path(name)
    content = mapping(path, Model, unknown)
    mixer = content.pop("mixer", Model.mixer)
    if not isinstance(mixer, str) or mixer not in RECURRENCES:
        raise ValueError(
            f"{path}: mixer is {str(mixer)[:200]!r}; it must be one of {', '.join(RECURRENCES)}"
        )
    return Model(**numbers(path, Model, content), mixer=mixer)


def costs(cluster: Cluster, model: Model, routed: bool = False, zero: int = 1) -> Costs:
    """Costs by which the planner prices a model's plans on a cluster."""
    return replace(model.known(zero).costs(cluster), routed=routed)
