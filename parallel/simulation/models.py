"""Models and clusters that the simulator knows: sizes in, seconds and bytes out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from parallel.planning.cost import Costs
from parallel.planning.states import States

CLUSTERS = Path(__file__).parent / "clusters"
MEMORY_SLACK = 0.15  # how far a rank's activations may exceed the even share
_E = 2  # bytes of a bf16 number
_AT_WORK = 3  # times q, k, v and o that the backward pass of a layer takes while it runs


@dataclass(frozen=True)
class Cluster:
    """A kind of node and its network; the YAML files of `clusters/` say what each is."""

    ranks_per_node: int
    tflops: float
    matmul: float
    attention: float
    inside_gb: float
    nics: int
    nic_gbit: float
    network: float
    memory_gb: float
    latency_inside_us: float = 10.0
    latency_between_us: float = 20.0

    @property
    def matmul_flops(self) -> float:
        """FLOPs a second of large matrix products."""
        return self.tflops * 1e12 * self.matmul

    def with_free_links(self) -> Cluster:
        """The same GPUs, between which bytes take no time."""
        return replace(
            self, inside_gb=np.inf, nic_gbit=np.inf, latency_inside_us=0.0, latency_between_us=0.0
        )

    def costs(
        self, heads: int, kv_heads: int, head_dim: int, dim: int, number_bytes: int = _E
    ) -> Costs:
        """What the planner weighs here for a layer of full attention.

        Args:
            dim: of what q, k and v are projected from and o to, wave by wave; 0 if not so.
            number_bytes: of an activation.
        """
        nic = self.nic_gbit / 8 * 1e9 * self.network
        to_qkv, from_o = _projections(heads, kv_heads, head_dim, dim)
        return Costs(
            pair=4.0 * heads * head_dim / (self.tflops * 1e12 * self.attention),
            q_bytes=float(number_bytes * heads * head_dim),
            kv_bytes=float(number_bytes * 2 * kv_heads * head_dim),
            heads=heads,
            kv_heads=kv_heads,
            to_qkv=to_qkv / self.matmul_flops,
            from_o=from_o / self.matmul_flops,
            inside=self.inside_gb * 1e9,
            between=self.nics * nic,
            nic=nic,
            flops=self.matmul_flops,
            latency_inside=self.latency_inside_us * 1e-6,
            latency_between=self.latency_between_us * 1e-6,
        )


def _projections(heads: int, kv_heads: int, head_dim: int, dim: int) -> tuple[float, float]:
    """FLOPs a token, forward, of the projections to q, k and v, and from o."""
    return 2.0 * dim * head_dim * (heads + 2 * kv_heads), 2.0 * dim * head_dim * heads


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
        projections = _projections(self.heads, self.kv_heads, self.head_dim, self.dim)
        return sum(projections) + 6.0 * self.dim * self.mlp_dim

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
        return _E * (3 * self.dim + self.heads * self.head_dim + 3 * self.mlp_dim)

    @property
    def mixer_bytes(self) -> float:
        """The same of one mixer where it works: q, k, v and o."""
        return _E * self.head_dim * (2 * self.heads + 2 * self.kv_heads)


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


def slack(kept: float, layer: float, others: float) -> float:
    """How far a rank's tokens in full attention may exceed the even share, for activations.

    They are kept within `MEMORY_SLACK`; q, k, v and o of these layers are but a part of them.

    Args:
        kept: of q, k, v and o of a token, in all layers that keep them at a time.
        layer: of these, in one layer.
        others: of all else that a token leaves behind for the backward pass, in the same units.
    """
    uneven = kept + _AT_WORK * layer
    return MEMORY_SLACK * (uneven + others) / uneven


def clusters() -> list[str]:
    """The names of the clusters described here."""
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """The cluster of a name here, or of a YAML file."""
    path = CLUSTERS / f"{name}.yaml" if name in clusters() else Path(name)
    return Cluster(**_read(path, Cluster, f"{name} is no cluster; {', '.join(clusters())} are"))


def cluster_of(device: str) -> Cluster:
    """The cluster here whose name is part of a device's, "NVIDIA H200" say; else that of h800."""
    known = [name for name in clusters() if name in device.lower()]
    return load_cluster(known[0] if known else "h800")


def load_model(name: str) -> Model:
    """The model of a name here, or of a YAML file with the fields of `Model`."""
    if name in MODELS:
        return MODELS[name]
    return Model(**_read(Path(name), Model, f"{name} is no model; {', '.join(MODELS)} are"))


def _read(path: Path, schema: type, unknown: str) -> dict[str, Any]:
    """The mapping in a YAML file, checked against a dataclass of numbers."""
    if not path.is_file():
        raise ValueError(f"{unknown}, and a YAML file's path is taken too")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {each.name for each in fields(schema)}
    if not isinstance(content, dict) or set(content) - known:
        extra = sorted(set(content) - known) if isinstance(content, dict) else content
        raise ValueError(f"{path}: {extra} not known; the keys are {', '.join(sorted(known))}")
    for key, value in content.items():
        if not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{path}: {key} is {value!r}; it must be a number above 0")
    return content


def costs(cluster: Cluster, model: Model, routed: bool = False) -> Costs:
    """What the planner weighs for a model on a cluster."""
    found = cluster.costs(model.heads, model.kv_heads, model.head_dim, model.dim)
    rest = model.rest_flops / max(1, model.full_layers) / cluster.matmul_flops
    return replace(found, routed=routed, states=model.states, rest=rest)
