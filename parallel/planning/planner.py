"""Plans of a run's batches, made in a thread while the step before them still runs."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from parallel.config import ParallelConfig
from parallel.planning.clusters import MEMORY_SLACK, cluster_of
from parallel.planning.costs import Costs, States
from parallel.planning.layout import Array, Plan, Topology
from parallel.planning.plan import Strategy, plan

_PLANS_KEPT = 8  # the newest plans, finished or begun; a step uses each of its plans once


@dataclass(frozen=True)
class FullAttention:
    """What the planner knows of a model with full-attention layers.

    Attributes:
        heads, kv_heads, head_dim: of such a layer; if there are several kinds, of the one with
            fewest heads.
        dim: width of the hidden states, if q, k, v and o are projected wave by wave; else 0.
        number_bytes: bytes of one number of an activation: 2 in bf16.
        slack: fraction by which memory lets a rank's tokens in attention exceed the even share.
        alone: no layer of another kind mixes tokens (linear attention, a convolution, a window),
            so nothing passes between fragments: the stream keeps tokens on attention's ranks.
        states: the linear layers, if there are any.
        rest_flops: forward FLOPs a token of everything but full attention, divided by the number
            of full-attention layers; 0 if not known, and then shards are even.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dim: int = 0
    number_bytes: int = 2
    slack: float = MEMORY_SLACK
    alone: bool = False
    states: States | None = None
    rest_flops: float = 0.0


class Planner:
    """Makes a run's plans; every rank makes the same ones by itself.

    Args:
        topology: the ranks.
        model: unless given, no plan splits heads, and costs are the defaults of `Costs`.
        device: name of a rank's accelerator, by which a cluster is chosen (`cluster_of`).
    """

    def __init__(
        self,
        config: ParallelConfig,
        topology: Topology,
        model: FullAttention | None = None,
        device: str = "",
    ) -> None:
        self.config, self.topology = config, topology
        self.costs = _costs(model, device) if model else Costs()
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
        return plan(
            lengths,
            self.topology,
            strategy,
            self.costs,
            self.slack,
            by_node=self.by_node,
            routing=self.config.routing,
        )


def pad_to_ranks(lengths: Array, ranks: int) -> Array:
    """The lengths, and sequences of one token appended until there is a token for each rank."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.append(lengths, np.ones(max(0, ranks - int(lengths.sum())), np.int64))


def _costs(model: FullAttention, device: str) -> Costs:
    """Costs of the model on the cluster that is chosen by the device's name."""
    found = cluster_of(device).costs(
        model.heads, model.kv_heads, model.head_dim, model.dim, model.number_bytes
    )
    return replace(found, states=model.states, rest=model.rest_flops / found.flops)
