"""One batch of a model on a cluster, what a step of it costs, and the bound that no step beats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from parallel.planning.clusters import MEMORY_SLACK, Cluster, slack
from parallel.planning.costs import ATTENTION_WORK, Costs
from parallel.planning.layout import Array, Topology
from parallel.planning.owners import rank_capacity
from parallel.simulation.models import Model, costs

BOTH = float(ATTENTION_WORK.sum())  # forward and backward of attention, in units of its forward


@dataclass(frozen=True)
class Outcome:
    """One step of one strategy.

    Attributes:
        seconds: length of the step.
        busy: float64 (ranks,), seconds that each rank computes.
        inside, between: bytes that all ranks send inside nodes and between nodes.
        memory: activations of the fullest rank, as a multiple of the even share.
        form: which of a strategy's published forms it is, in words.
    """

    seconds: float
    busy: Array
    inside: float
    between: float
    memory: float
    form: str = ""

    @property
    def balance(self) -> float:
        """Mean seconds of computing over those of the busiest rank."""
        return float(self.busy.mean() / self.busy.max())


@dataclass(frozen=True)
class Case:
    """One batch of a model on a cluster, under a stage of ZeRO."""

    lengths: Array
    topology: Topology
    cluster: Cluster
    model: Model
    routing: bool = True
    zero: int = 1

    @property
    def share(self) -> float:
        """Tokens of an even shard."""
        return float(self.lengths.sum()) / self.topology.ranks

    @property
    def room(self) -> float:
        """Tokens with which a rank's memory is at its limit, if all layers hold as many."""
        return rank_capacity(self.lengths, self.topology, MEMORY_SLACK)

    @property
    def slack(self) -> float:
        """Fraction by which a rank's tokens in full attention may exceed the even share, by
        memory: see `clusters.slack`."""
        model = self.model
        others = model.layers * model.stream_bytes + model.linear_layers * model.mixer_bytes
        return slack(model.full_layers * model.mixer_bytes, model.mixer_bytes, others)

    @cached_property
    def _costs(self) -> Costs:
        return costs(self.cluster, self.model, zero=self.zero)

    def costs(self, routed: bool = False) -> Costs:
        """Costs by which every strategy is priced: the links are what ZeRO's traffic leaves."""
        return replace(self._costs.beside_zero(self.lengths, self.topology), routed=routed)

    def published(self, routed: bool = False) -> Costs:
        """Costs for alternatives that split no heads and plan by full attention only."""
        return replace(self.costs(routed), heads=1, kv_heads=1, rest=0.0)

    @property
    def zero_seconds(self) -> float:
        """Seconds of ZeRO's traffic in a step, which cannot be shorter."""
        return max(self._costs.zero_seconds(self.topology)) * max(1, self.model.full_layers)

    def linear_seconds(self, tokens: Array | float) -> Array | float:
        """Seconds of all layers but full attention, forward and backward, for a rank's tokens."""
        return tokens * self._costs.rest_both_ways * max(1, self.model.full_layers)

    def attention_seconds(self) -> Array:
        """float64 (N,): seconds of each sequence's full attention on one rank, all layers, forward
        and backward."""
        each = self._costs.attention(0 * self.lengths, self.lengths)
        return BOTH * self.model.full_layers * each

    def memory(self, stream: float, mixing: float, transient: float = 0.0) -> float:
        """Activations of the fullest rank, as a multiple of the even share.

        Args:
            stream: its tokens in the stream.
            mixing: its tokens in the mixing layers, averaged over the layers.
            transient: further bytes that it holds at one time.
        """
        model = self.model
        bytes_each = model.layers * model.stream_bytes, model.layers * model.mixer_bytes
        held = stream * bytes_each[0] + mixing * bytes_each[1] + transient
        return held / (self.share * sum(bytes_each))


def lower_bound(case: Case) -> float:
    """Seconds of a step if all work were perfectly even, no sequence cut and no byte sent."""
    work = case.linear_seconds(float(case.lengths.sum())) + case.attention_seconds().sum()
    return float(work / sum(case.topology.speeds))
