"""Clusters that plans are priced for: one YAML file each, and the `Costs` that follow from it."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from parallel.planning.costs import Costs

BF16 = 2  # bytes of one number
MEMORY_SLACK = 0.15  # a rank's activations may exceed the even share by this fraction
_AT_WORK = 3  # memory of a layer's backward pass while it runs, in units of its q, k, v and o
_MOST = 1e12  # of a number that describes a cluster or a model
_LONGEST = 1 << 20  # characters of such a file
_SHOWN = 200  # characters of what is shown of it
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cluster:
    """A kind of node and its network.

    Attributes:
        ranks_per_node: GPUs on one node.
        tflops: peak of one GPU in dense bf16 products, 10¹² FLOPs a second.
        matmul, attention: shares of that peak which large matrix products, and causal attention
            over long sequences, reach.
        inside_gb: 10⁹ bytes a second between one GPU and the others of its node.
        nics, nic_gbit: network cards of a node, and 10⁹ bits a second of each.
        network: share of a card's rate that transfers reach.
        memory_gb: memory of one GPU, 10⁹ bytes.
        latency_inside_us, latency_between_us: microseconds before the first byte arrives, inside
            a node and between nodes.
    """

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
        """Costs of one full-attention layer on this cluster.

        Args:
            dim: width of the hidden states that are projected to q, k and v, and to which o is
                projected back, wave by wave; 0 if the layer does not project wave by wave.
            number_bytes: bytes of one number of an activation.
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
    """Forward FLOPs a token of two projections: hidden states to q, k and v; o back to them."""
    return 2.0 * dim * head_dim * (heads + 2 * kv_heads), 2.0 * dim * head_dim * heads


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
    path = _HERE / f"{name}.yaml" if name in clusters() else Path(name)
    return Cluster(
        **numbers(
            path,
            Cluster,
            f"cluster is {name[:_SHOWN]!r}; it must be one of {', '.join(clusters())}",
        )
    )


def cluster_of(device: str) -> Cluster:
    """The cluster whose name is part of the device's name ("NVIDIA H200"); h800 if none is."""
    known = [name for name in clusters() if name in device.lower()]
    return load_cluster(known[0] if known else "h800")


def numbers(path: Path, schema: type, unknown: str) -> dict[str, Any]:
    """A YAML file's mapping, whose keys are fields of the dataclass `schema` and values > 0.

    Raises:
        ValueError: no such file (the message begins with `unknown`), a wrong key or value.
    """
    if not os.path.isfile(path):  # no error for a name that is too long for one
        raise ValueError(f"{unknown}, or the path of a YAML file")
    content = document(path)
    known = {each.name: each for each in fields(schema)}
    needed = [name for name, each in known.items() if each.default is MISSING]
    keys = f"the keys are {', '.join(sorted(known))}"
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it must be a mapping of keys to numbers; {keys}")
    if extra := sorted({str(key)[:_SHOWN] for key in content if key not in known}):
        raise ValueError(f"{path}: unknown {', '.join(extra)[:_SHOWN]}; {keys}")
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{path}: {', '.join(missing)} must be given; {keys}")
    for key, value in content.items():
        whole = known[key].type in (int, "int")
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value <= _MOST:
            raise ValueError(
                f"{path}: {key} is {str(value)[:_SHOWN]!r}; it must be a "
                f"{'whole ' if whole else ''}number above 0, at most {_MOST:.0e}"
            )
    return content


def document(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: it cannot be read, or is no YAML; the message is one line that names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text):,} characters are more than {_LONGEST:,}")
        return yaml.safe_load(text)
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except RecursionError:
        reason = "it is nested too deep"
    except OSError as error:
        reason = error.strerror or "no file"
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:_SHOWN]
    raise ValueError(f"{path}: cannot be read as YAML ({reason})")
