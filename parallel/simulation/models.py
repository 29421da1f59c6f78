"""Models that the simulator knows: sizes in, seconds and bytes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.planning.clusters import BF16, Cluster, numbers, projections
from parallel.planning.costs import Costs, States


@dataclass(frozen=True)
class Model:
    """A decoder of SwiGLU blocks; every `full_every`-th block has full attention.

    The other blocks have gated delta rule mixers with `heads` heads of `head_dim`, a short
    convolution and a gate on the output.
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
        """The linear layers as the planner knows them."""
        if not self.linear_layers:
            return None
        one = 4.0 * self.head_dim**2  # bytes of M, and of E, fp32
        layers = self.linear_layers / max(1, self.full_layers)
        return States(layers, self.heads, one, one, self.mixer_flops, self.gate_flops)

    @property
    def stream_bytes(self) -> float:
        """Bytes that a token leaves behind in one block for the backward pass, in the stream.

        The block's input, two norms, the output of the mixer, and the MLP's three.
        """
        return BF16 * (3 * self.dim + self.heads * self.head_dim + 3 * self.mlp_dim)

    @property
    def mixer_bytes(self) -> float:
        """The same of one mixer where it works: q, k, v and o."""
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
    """The model of a name here, or of a YAML file with the fields of `Model`."""
    if name in MODELS:
        return MODELS[name]
    return Model(**numbers(Path(name), Model, f"{name} is no model; {', '.join(MODELS)} are"))


def costs(cluster: Cluster, model: Model, routed: bool = False) -> Costs:
    """What the planner weighs for a model on a cluster."""
    found = cluster.costs(model.heads, model.kv_heads, model.head_dim, model.dim)
    rest = model.rest_flops / max(1, model.full_layers) / cluster.matmul_flops
    return replace(found, routed=routed, states=model.states, rest=rest)
