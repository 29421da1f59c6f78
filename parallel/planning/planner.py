"""Plans of a run's batches, made in a thread while the step before them still runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from parallel.config import ParallelConfig
from parallel.planning.clusters import (
    MEMORY_SLACK,
    Cluster,
    LinearLayers,
    Work,
    cluster_of,
    load_cluster,
)
from parallel.planning.cost import price
from parallel.planning.costs import Costs
from parallel.planning.layout import Array, Plan, Topology
from parallel.planning.plan import Strategy, plan
from parallel.planning.states import price_states

_PLANS_KEPT = 8  # the newest plans, finished or begun; a step uses each of its plans once


@dataclass(frozen=True)
class FullAttention:
    """What the planner knows of a model: its full-attention layers, and what is beside them.

    Attributes:
        heads, kv_heads, head_dim: of such a layer; if there are several kinds, of the one with
            fewest heads. `heads` is 0 if the model has none: then all other work is made even.
        dim: width of the hidden states, if q, k, v and o are projected wave by wave; else 0.
        number_bytes: bytes of one number of an activation: 2 in bf16.
        slack: fraction by which memory lets a rank's tokens in attention exceed the even share.
        alone: no layer of another kind mixes tokens (linear attention, a convolution, a window),
            so nothing passes between fragments: the stream keeps tokens on attention's ranks.
        layers: how many full-attention layers there are; 1 if there are none.
        linear: the linear layers, if there are any.
        work: everything but full attention; None if not known, and then shards are even.
        zero_bytes: of weights and gradients, that ZeRO brings to a rank for a batch.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dim: int = 0
    number_bytes: int = 2
    slack: float = MEMORY_SLACK
    alone: bool = False
    layers: int = 1
    linear: LinearLayers | None = None
    work: Work | None = None
    zero_bytes: float = 0.0

    def costs(self, cluster: Cluster) -> Costs:
        """Costs of one of its full-attention layers, and of what comes with it, on a cluster."""
        forward, backward = cluster.rest(self.work) if self.work else (0.0, 0.0)
        return replace(
            cluster.costs(self.heads, self.kv_heads, self.head_dim, self.dim, self.number_bytes),
            states=cluster.states(self.linear) if self.linear else None,
            rest=forward / self.layers,
            rest_backward=backward / forward if forward else 2.0,
            weights=self.zero_bytes / self.layers,
            layers=self.layers,
        )


class Planner:
    """Makes a run's plans; every rank makes the same ones by itself.

    Args:
        topology: the ranks.
        model: unless given, no plan splits heads, and costs are the defaults of `Costs`.
        device: name of a rank's accelerator, by which a cluster is chosen (`cluster_of`) unless
            the config names one.

    Raises:
        ValueError: the config names a cluster that does not exist, or whose file is wrong.
    """

    def __init__(
        self,
        config: ParallelConfig,
        topology: Topology,
        model: FullAttention | None = None,
        device: str = "",
    ) -> None:
        self.config, self.topology = config, with_speeds(topology, config.speeds)
        cluster = load_cluster(config.cluster) if config.cluster else cluster_of(device)
        self.costs = model.costs(cluster) if model else Costs()
        self.slack = model.slack if model else MEMORY_SLACK
        self.by_node = model is None or not model.alone
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._plans: OrderedDict[bytes, Future[Plan]] = OrderedDict()

    def begin(self, lengths: Array) -> None:
        """Start planning a batch of sequences of these lengths (N,), and return at once."""
        if self.topology.ranks > 1:
            self._begin(pad_to_ranks(lengths, self.topology.ranks))

    def plan(self, lengths: Array) -> Plan:
        """The plan of a batch; waits for it if `begin` was called, else makes it now."""
        return self._begin(pad_to_ranks(lengths, self.topology.ranks)).result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, lengths: Array) -> Future[Plan]:
        key = lengths.tobytes()
        if key not in self._plans:
            self._plans[key] = self._thread.submit(self._make, lengths)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[key]

    def _make(self, lengths: Array) -> Plan:
        # Ulysses splits heads and leaves tokens in the stream's layout, as all-gather does.
        attention = self.config.attention
        strategy: Strategy = "allgather" if attention == "ulysses" else attention
        costs = self.costs.beside_zero(lengths, self.topology)
        given = (self.slack, self.by_node, self.config.routing)
        made = plan(lengths, self.topology, strategy, costs, *given)
        return made if self.costs.pair else without_attention(lengths, made, costs)


def without_attention(lengths: Array, made: Plan, costs: Costs) -> Plan:
    """The cheaper plan for a model without full attention: this one, or the batch in its order.

    In order, no more sequences are cut than there are bounds between shards, and each only there.
    """
    in_order = plan(lengths, made.topology, "allgather")

    def seconds(of: Plan) -> float:
        layers = costs.states.layers if costs.states else 0.0
        return price(of, costs).seconds + layers * price_states(of, costs)[0]

    return min(in_order, made, key=seconds)


def with_speeds(topology: Topology, speeds: Mapping[int, float]) -> Topology:
    """The topology in which these ranks have these speeds, and all others the full one.

    Raises:
        ValueError: a rank or a speed is out of range.
    """
    each = [1.0] * topology.ranks
    for rank, speed in speeds.items():
        if not 0 <= rank < topology.ranks:
            raise ValueError(
                f"parallel.speeds names rank {rank}; it must be one of 0 to {topology.ranks - 1}"
            )
        if not 0.01 <= speed <= 1:
            raise ValueError(
                f"parallel.speeds[{rank}] is {speed:g}; it must be a number from 0.01 to 1, the "
                "share of a quick rank's speed that this one was measured to have"
            )
        each[rank] = speed
    return replace(topology, speeds=tuple(each))


def pad_to_ranks(lengths: Array, ranks: int) -> Array:
    """The lengths, and sequences of one token appended until there is a token for each rank."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.append(lengths, np.ones(max(0, ranks - int(lengths.sum())), np.int64))
