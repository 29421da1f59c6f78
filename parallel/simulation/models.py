"""Models that the simulator knows: their sizes, and the FLOPs and bytes a token that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.planning.clusters import BF16, Cluster, numbers, projections
from parallel.planning.costs import Costs, States


@dataclass(frozen=True)
class Model:
    """A decoder of SwiGLU blocks; one in `full_every` blocks has full attention.

    The other blocks have gated delta rule mixers with `heads` heads of `head_dim`, a short
    convolution and a gate on the output.

    Attributes:
        layers: number of blocks.
        dim, mlp_dim: width of the residual stream, and inside an MLP.
        heads, kv_heads, head_dim: of full attention.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    mlp_dim: int
    head_dim: int = 128
    vocab_size: int = 32000
    full_every: int = 1

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
    def mixer_flops(self) -> float:
        """FLOPs a token of one linear-attention mixer, forward."""
        from kernels import flops

        return flops.linear_attention([1], self.heads, self.head_dim, self.head_dim, True)

    @property
    def gate_flops(self) -> float:
        """FLOPs a token of the projection to one linear-attention mixer's gate, forward."""
        return 2.0 * self.dim * self.head_dim * self.heads

    @property
    def rest_flops(self) -> float:
        """FLOPs a token, forward, of all but full attention."""
        linear = self.linear_layers * (self.mixer_flops + self.gate_flops)
        return self.layers * self.dense_flops + self.head_flops + linear

    @property
    def states(self) -> States | None:
        """What the planner knows of the linear layers; None if there are none."""
        if not self.linear_layers:
            return None
        one = 4.0 * self.head_dim**2  # bytes of M (Dk, Dk), and of E (Dk, Dv), in fp32
        layers = self.linear_layers / max(1, self.full_layers)
        return States(layers, self.heads, one, one, self.mixer_flops, self.gate_flops)

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
    return Model(
        **numbers(
            Path(name), Model, f"model is {name[:200]!r}; it must be one of {', '.join(MODELS)}"
        )
    )


def costs(cluster: Cluster, model: Model, routed: bool = False) -> Costs:
    """Costs by which the planner prices a model's plans on a cluster."""
    found = cluster.costs(model.heads, model.kv_heads, model.head_dim, model.dim)
    rest = model.rest_flops / max(1, model.full_layers) / cluster.matmul_flops
    return replace(found, routed=routed, states=model.states, rest=rest)
