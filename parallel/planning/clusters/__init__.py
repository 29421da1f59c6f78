"""Clusters that plans are priced for: a YAML file here each, sizes in, seconds and bytes out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from parallel.planning.costs import Costs

BF16 = 2  # bytes of a number
MEMORY_SLACK = 0.15  # how far a rank's activations may exceed the even share
_AT_WORK = 3  # times q, k, v and o that the backward pass of a layer takes while it runs
_HERE = Path(__file__).parent


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
        self, heads: int, kv_heads: int, head_dim: int, dim: int, number_bytes: int = BF16
    ) -> Costs:
        """What the planner weighs here for a layer of full attention.

        Args:
            dim: of what q, k and v are projected from and o to, wave by wave; 0 if not so.
            number_bytes: of an activation.
        """
        nic = self.nic_gbit / 8 * 1e9 * self.network
        to_qkv, from_o = projections(heads, kv_heads, head_dim, dim)
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


def projections(heads: int, kv_heads: int, head_dim: int, dim: int) -> tuple[float, float]:
    """FLOPs a token, forward, of the projections to q, k and v, and from o."""
    return 2.0 * dim * head_dim * (heads + 2 * kv_heads), 2.0 * dim * head_dim * heads


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
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """The cluster of a name here, or of a YAML file."""
    path = _HERE / f"{name}.yaml" if name in clusters() else Path(name)
    return Cluster(**numbers(path, Cluster, f"{name} is no cluster; {', '.join(clusters())} are"))


def cluster_of(device: str) -> Cluster:
    """The cluster here whose name is part of a device's, "NVIDIA H200" say; else that of h800."""
    known = [name for name in clusters() if name in device.lower()]
    return load_cluster(known[0] if known else "h800")


def numbers(path: Path, schema: type, unknown: str) -> dict[str, Any]:
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
