"""Which ranks hold which experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from parallel.planning.layout import Topology


@dataclass(frozen=True)
class Homes:
    """Experts over ranks: every rank is a home of a run of them.

    With no more ranks than experts each expert has one home, and ranks have as many as the others
    or one more. With more ranks a rank has one expert, which several ranks hold: its replicas.
    """

    experts: int
    topology: Topology

    @property
    def replicated(self) -> bool:
        """Whether a rank has one expert, and others may have it too."""
        return self.topology.ranks > self.experts

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 (ranks, 2): rank r has experts [bounds[r, 0], bounds[r, 1])."""
        ranks = np.arange(self.topology.ranks)
        first = ranks * self.experts // len(ranks)
        last = (ranks + 1) * self.experts // len(ranks)
        return np.stack([first, np.maximum(last, first + 1)], axis=1)

    def run(self, rank: int) -> tuple[int, int]:
        """The experts of a rank, as [first, end)."""
        first, end = self.bounds[rank].tolist()
        return first, end

    def replicas(self, rank: int) -> list[int]:
        """The ranks that hold what `rank` holds, itself among them."""
        same = (self.bounds == self.bounds[rank]).all(axis=1)
        return [int(one) for one in np.flatnonzero(same)]

    @property
    def fullest(self) -> int:
        """A rank that has as many experts as any."""
        return int(np.diff(self.bounds)[:, 0].argmax())

    @property
    def groups(self) -> list[list[int]]:
        """The ranks that hold the same, for every run of experts."""
        ranks = range(self.topology.ranks)
        return [group for rank in ranks if (group := self.replicas(rank))[0] == rank]

    def seen_from(self, rank: int) -> np.ndarray:
        """int64 (experts,): the home to which rows of each expert go from `rank`.

        Of several one on the rank's own node, if there is any; if not, one that its proxy on
        another node sends to. Ranks spread over them.
        """
        firsts, lasts = self.bounds.T
        if not self.replicated:
            return np.repeat(np.arange(len(firsts)), lasts - firsts)
        topology, node = self.topology, self.topology.node(rank)
        experts = np.arange(self.experts)
        # (experts,): replicas are one rank after the other, and so are the nodes that they are on.
        low, high = (np.searchsorted(firsts, experts, side) for side in ("left", "right"))
        first, last = topology.node(low), topology.node(high - 1)
        near = (first <= node) & (node <= last)
        there = np.where(near, node, first + self._numbers[rank] % (last - first + 1))
        begin, size = topology.first[there], np.array(topology.sizes)[there]
        low, high = np.maximum(low, begin), np.minimum(high, begin + size)
        return low + self._numbers[self.proxy(rank, low)] % (high - low)

    def proxy(self, rank: Any, home: Any) -> Any:
        """The rank on the node of `home` that gets what `rank` sends there: of the same number on
        its node, round again where nodes have fewer ranks. Of arrays, of each pair."""
        node = self.topology.node(home)
        sizes = np.array(self.topology.sizes)
        return self.topology.first[node] + self._numbers[rank] % sizes[node]

    def inside(self, pairs: np.ndarray) -> np.ndarray:
        """(ranks, ranks): what each proxy sends to each home on its node, if `pairs` (ranks,
        ranks) are what each rank has for each home."""
        ranks = np.arange(self.topology.ranks)
        proxies = self.proxy(ranks[:, None], ranks[None, :])  # (ranks, homes)
        found = np.zeros_like(pairs)
        np.add.at(found, (proxies, np.broadcast_to(ranks, proxies.shape)), pairs)
        return found

    def visits(self, chosen: int) -> tuple[float, float]:
        """How often a token's row goes to another node, and how often to another rank inside of a
        node, in the mean over ranks, if any `chosen` experts are as likely as others."""
        topology = self.topology
        ranks = np.arange(topology.ranks)
        nodes = topology.node(ranks)
        seen = self.seen_from(0)
        between = inside = 0.0
        for source in range(topology.ranks):
            seen = self.seen_from(source) if self.replicated else seen
            held = np.bincount(seen, minlength=len(ranks))  # experts for which a row goes to a rank
            of_nodes = np.bincount(nodes, held).astype(np.int64)
            others = np.arange(topology.nodes) != nodes[source]
            between += self.chance(of_nodes, chosen)[others].sum()
            inside += self.chance(held, chosen)[self.proxy(source, ranks) != ranks].sum()
        return float(between / topology.ranks), float(inside / topology.ranks)

    def chance(self, held: np.ndarray, chosen: int) -> np.ndarray:
        """The chance that one of `held` experts is among `chosen`, if any are as likely."""
        left = self.experts - np.arange(chosen)  # (chosen,)
        missed = np.maximum(left - held[:, None], 0) / left
        return 1 - missed.prod(axis=1)

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Each rank's number on its node."""
        ranks = np.arange(self.topology.ranks)
        return ranks - self.topology.first[self.topology.node(ranks)]
