"""Clusters that plans are priced for: one YAML file each, and the `Costs` that follow from it.

For each number a file says under `sources` whether it is measured, published, scaled from another
one or assumed, and where it is from. `python -m parallel measure` writes such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parallel.planning.costs import ATTENTION_WORK, MATMUL_WORK, Costs, States
from parallel.planning.described import SHOWN, checked, mapping, numbers
from parallel.planning.passes import Passes

BF16 = 2  # bytes of one number
MEMORY_SLACK = 0.15  # a rank's activations may exceed the even share by this fraction
_AT_WORK = 3  # memory of a layer's backward pass while it runs, in units of its q, k, v and o
_HERE = Path(__file__).parent


# Kinds of linear mixers by their recurrence: decay and delta rule (`kernels.linear_attention`).
RECURRENCES = {
    "linear": ("none", False),
    "retention": ("head", False),
    "mamba2": ("scalar", False),
    "gla": ("vector", False),
    "deltanet": ("none", True),
    "gated_deltanet": ("scalar", True),
    "kda": ("vector", True),
}
HEAD_DIM = 128  # of the heads that times of recurrences are given for
SOURCES = ("measured", "published", "scaled", "assumed")


@dataclass(frozen=True)
class Recurrence:
    """Nanoseconds a token and head of `HEAD_DIM` × `HEAD_DIM` of one kind of linear mixer.

    Attributes:
        forward, backward: of the op.
        middle: forward, of a fragment in the middle of a cut sequence.
        gradient: of the entering state of such a fragment, besides its backward pass
            (`parallel.planning.passes`).
    """

    forward: float
    backward: float
    middle: float
    gradient: float


class Recurrent(NamedTuple):
    """A linear mixer's recurrence: one of `RECURRENCES`, its heads, and the shape of a state."""

    kind: str
    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Work:
    """Forward work a token of a whole model but for its full attention.

    Attributes:
        products: FLOPs of matrix products.
        recurrences: of each linear mixer.
        windows: FLOPs of attention in sliding windows.
        touched: bytes that norms, gates, activations and residuals read and write.
    """

    products: float
    recurrences: tuple[Recurrent, ...] = ()
    windows: float = 0.0
    touched: float = 0.0


@dataclass(frozen=True)
class LinearLayers:
    """What the planner is told of a model's linear layers.

    Attributes:
        layers: how many there are for each full-attention layer.
        recurrence: of one of them.
        beside_flops: forward FLOPs a token of what is computed while states travel.
        halo_bytes: bytes of the tokens that the short convolution needs before a fragment.
    """

    layers: float
    recurrence: Recurrent
    beside_flops: float = 0.0
    halo_bytes: float = 0.0

    @property
    def map_numbers(self) -> int:
        """Numbers of one head's M: a factor, a diagonal or a matrix."""
        decay, delta = RECURRENCES[self.recurrence.kind]
        width = self.recurrence.key_dim
        return width**2 if delta else width if decay == "vector" else 1


@dataclass(frozen=True)
class Cluster:
    """A kind of node and its network.

    Attributes:
        ranks_per_node: GPUs on one node.
        tflops: peak of one GPU in dense bf16 products, 10¹² FLOPs a second.
        matmul, attention: shares of that peak which large matrix products, and causal attention
            over long sequences (forward and backward together), reach.
        memory_gbs: 10⁹ bytes a second that norms, copies and gates read and write.
        inside_gb: 10⁹ bytes a second between one GPU and the others of its node.
        nics, nic_gbit: network cards of a node, and 10⁹ bits a second of each.
        network: share of a card's rate that transfers reach.
        memory_gb: memory of one GPU, 10⁹ bytes.
        recurrence: times of linear mixers, by kind.
        attention_tile: rows that the kernel of softmax attention takes at a time.
        launch_us: microseconds that a kernel takes at least.
        latency_inside_us, latency_between_us: microseconds before the first byte arrives, inside
            a node and between nodes.
        sources: for each of these, where it is from; begins with one of `SOURCES`.
    """

    ranks_per_node: int
    tflops: float
    matmul: float
    attention: float
    memory_gbs: float
    inside_gb: float
    nics: int
    nic_gbit: float
    network: float
    memory_gb: float
    recurrence: Mapping[str, Recurrence]
    attention_tile: int = 128
    launch_us: float = 4.0
    latency_inside_us: float = 10.0
    latency_between_us: float = 20.0
    sources: Mapping[str, str] = field(default_factory=dict)

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
        self, heads: int, kv_heads: int, head_dim: int, dim: int, number_bytes: int = BF16
    ) -> Costs:
        """Costs of one full-attention layer on this cluster.

        Args:
            heads: 0 if the model has no full attention: a layer of no work and no bytes.
            dim: width of the hidden states that are projected to q, k and v, and to which o is
                projected back, wave by wave; 0 if the layer does not project wave by wave.
            number_bytes: bytes of one number of an activation.
        """
        nic = self.nic_gbit / 8 * 1e9 * self.network
        to_qkv, from_o = projections(heads, kv_heads, head_dim, dim)
        return Costs(
            pair=4.0 * heads * head_dim / (self.tflops * 1e12 * self.attention),
            tile=self.attention_tile,
            launch=self.launch_us * 1e-6,
            copy=1e-9 / self.memory_gbs,
            q_bytes=float(number_bytes * heads * head_dim),
            kv_bytes=float(number_bytes * 2 * kv_heads * head_dim),
            heads=max(1, heads),
            kv_heads=max(1, kv_heads),
            to_qkv=to_qkv / self.matmul_flops,
            from_o=from_o / self.matmul_flops,
            inside=self.inside_gb * 1e9,
            between=self.nics * nic,
            nic=nic,
            flops=self.matmul_flops,
            latency_inside=self.latency_inside_us * 1e-6,
            latency_between=self.latency_between_us * 1e-6,
        )

    def seconds(self, of: Recurrent) -> Recurrence:
        """Seconds a token of a linear mixer, as a `Recurrence`.

        Times at `HEAD_DIM` × `HEAD_DIM` are scaled by the FLOPs of the op.
        """
        from kernels.flops import linear_attention

        _, delta = RECURRENCES[of.kind]
        given = linear_attention([1], 1, HEAD_DIM, HEAD_DIM, delta)
        scale = 1e-9 * linear_attention([1], of.heads, of.key_dim, of.value_dim, delta) / given
        told = self.recurrence[of.kind]
        return Recurrence(*(scale * getattr(told, each.name) for each in fields(told)))

    def rest(self, work: Work) -> tuple[float, float]:
        """Seconds a token of `work`, forward and backward."""
        mixers = [self.seconds(each) for each in work.recurrences]
        windows = work.windows / (self.tflops * 1e12 * self.attention)
        passes = (
            float(products) * work.products / self.matmul_flops
            + float(pairs) * windows
            + float(products) * work.touched / (1e9 * self.memory_gbs)
            for products, pairs in zip(MATMUL_WORK, ATTENTION_WORK, strict=True)
        )
        forward, backward = passes
        return (
            forward + sum(each.forward for each in mixers),
            backward + sum(each.backward for each in mixers),
        )

    def states(self, linear: LinearLayers) -> States:
        """Costs of the linear layers' states on this cluster. Maps and states are fp32."""
        one, seconds = linear.recurrence, self.seconds(linear.recurrence)
        return States(
            layers=linear.layers,
            heads=one.heads,
            M_bytes=4.0 * linear.map_numbers,
            E_bytes=4.0 * one.key_dim * one.value_dim,
            passes=Passes(max(0.0, seconds.middle - seconds.forward), seconds.gradient),
            beside=linear.beside_flops / self.matmul_flops,
            halo_bytes=linear.halo_bytes,
        )


def projections(heads: int, kv_heads: int, head_dim: int, dim: int) -> tuple[float, float]:
    """Forward FLOPs a token of two projections: hidden states to q, k and v; o back to them."""
    return 2.0 * dim * head_dim * (heads + 2 * kv_heads), 2.0 * dim * head_dim * heads


def zero_bytes(parameters: float, number_bytes: float, stage: int, accumulate: int = 1) -> float:
    """Bytes of weights and gradients that ZeRO brings to every rank for one batch.

    Stage 3 gathers weights before each pass and reduces gradients after it. Stages 1 and 2 gather
    weights once a step, stage 0 the reduced gradients; of these only stage 2 reduces gradients at
    every batch.

    Args:
        accumulate: batches of a step.
    """
    a_step, a_batch = {0: (2, 0), 1: (2, 0), 2: (1, 1), 3: (0, 3)}[stage]
    return parameters * number_bytes * (a_step / accumulate + a_batch)


def slack(kept: float, layer: float, others: float) -> float:
    """By which fraction a rank's tokens in full attention may exceed the even share.

    All activations of a rank may exceed it by `MEMORY_SLACK`. Only q, k, v and o of full attention
    lie unevenly, so their token count may exceed it by more. All arguments are in one unit, say
    bytes a token.

    Args:
        kept: q, k, v and o of all full-attention layers that keep them at one time.
        layer: q, k, v and o of one such layer.
        others: everything else that a token leaves behind for the backward pass.
    """
    uneven = kept + _AT_WORK * layer
    return MEMORY_SLACK * (uneven + others) / uneven


def clusters() -> list[str]:
    """The names of the clusters described here."""
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """The cluster with that name here, or described by the YAML file at that path.

    Raises:
        ValueError: neither exists, or a key or value of the file is wrong.
    """
    if name in clusters():
        return _shipped(name)
    known = ", ".join(clusters())
    return _read(Path(name), f"cluster is {name[:SHOWN]!r}; it must be one of {known}")


@cache
def _shipped(name: str) -> Cluster:
    return _read(_HERE / f"{name}.yaml", "")


def _read(path: Path, unknown: str) -> Cluster:
    """A described cluster; `unknown` says what is wrong where there is no such file."""
    content = mapping(path, Cluster, unknown)
    nested = {key: content.pop(key, None) for key in ("recurrence", "sources")}
    return Cluster(
        **numbers(path, Cluster, content, given=("recurrence", "sources")),
        recurrence=_recurrences(path, nested["recurrence"]),
        sources=_sources(path, nested["sources"]),
    )


def cluster_of(device: str) -> Cluster:
    """The cluster whose name is part of the device's name ("NVIDIA H200"); h800 if none is."""
    known = [name for name in clusters() if name in device.lower()]
    return load_cluster(known[0] if known else "h800")


def _recurrences(path: Path, content: Any) -> dict[str, Recurrence]:
    """Times of every kind of linear mixer."""
    kinds = ", ".join(RECURRENCES)
    if not isinstance(content, dict) or set(content) != set(RECURRENCES):
        raise ValueError(f"{path}: recurrence must be a mapping with one entry each for {kinds}")
    found = {}
    for kind in RECURRENCES:
        at = f"{path}: recurrence.{kind}"
        found[kind] = Recurrence(**numbers(at, Recurrence, checked(at, Recurrence, content[kind])))
    return found


def _sources(path: Path, content: Any) -> dict[str, str]:
    """Where each number is from; a file of one's own need not say it."""
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and str(said).split(" ")[0].rstrip(":,") in SOURCES
        for key, said in content.items()
    ):
        raise ValueError(
            f"{path}: sources must say of each key where its number is from, in a text that begins "
            f"with one of {', '.join(SOURCES)}"
        )
    return {key: str(said) for key, said in content.items()}
