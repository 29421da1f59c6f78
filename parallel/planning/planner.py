"""Plans of a model's batches, made while the step before them still runs."""

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

_KEPT = 8  # plans, of which a step uses each once


@dataclass(frozen=True)
class FullAttention:
    """What a planner must know of a model with full-attention layers.

    Attributes:
        heads, kv_heads, head_dim: of such a layer; of several kinds the one with fewest heads.
        dim: of what q, k and v are projected from, and o to, if that is done wave by wave; else 0.
        number_bytes: of an activation, 2 for bf16.
        slack: how far memory lets a rank's tokens there exceed the even share, as a fraction.
        alone: no layer of another kind mixes tokens (linear attention, a convolution, a
            window), so that no state has to pass: tokens stay on attention's ranks.
        states: what passes from rank to rank in layers of linear attention, if there are any.
        rest_flops: a token, forward, of all but full attention, by one layer of that; 0 if not
            known: then shards are even.
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
    """Makes the plans of a run, alike on every rank.

    Args:
        topology: the ranks.
        device: the name of a rank's accelerator, which tells what the planner may assume of
            its speed and of the network; of an unknown one that of a usual cluster.
        model: unless given, heads stay together and costs are those of a usual layer.
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
        """Start to plan a batch of sequences of these lengths; nothing is waited for."""
        if self.topology.ranks > 1:
            self._begin(filled(lengths, self.topology.ranks))

    def plan(self, lengths: Array) -> Plan:
        """The plan of a batch, which may have been begun before."""
        return self._begin(filled(lengths, self.topology.ranks)).result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, lengths: Array) -> Future[Plan]:
        key = lengths.tobytes()
        if key not in self._plans:
            self._plans[key] = self._thread.submit(self._make, lengths)
            while len(self._plans) > _KEPT:
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


def filled(lengths: Array, ranks: int) -> Array:
    """With as many sequences of one token more as it takes for each rank to hold a token."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.append(lengths, np.ones(max(0, ranks - int(lengths.sum())), np.int64))


def _costs(model: FullAttention, device: str) -> Costs:
    """Of the model on the cluster that such devices make up."""
    found = cluster_of(device).costs(
        model.heads, model.kv_heads, model.head_dim, model.dim, model.number_bytes
    )
    return replace(found, states=model.states, rest=model.rest_flops / found.flops)
