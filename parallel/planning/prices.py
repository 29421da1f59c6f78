"""Seconds of each sequence of a batch on every size of group that it may be placed on."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np

from parallel.planning.costs import Costs
from parallel.planning.layout import Array, Topology


class Prices:
    """Estimated seconds (`Costs.ring_seconds`) of a batch's sequences, cached by group size.

    A group is nodes · each ranks, `each` on a node, over which a sequence makes a ring. Seconds are
    those of one rank of the group, forward and backward.

    Args:
        by_rank: the stream keeps a token on its rank; else on its node.

    Attributes:
        alone: float64 (N,), seconds of each sequence on one rank.
        level: seconds of a rank if attention were even over all ranks.
        placed: owners and rings' grids that `placing.balanced` came to, by what they follow from.
    """

    def __init__(self, lengths: Array, topology: Topology, costs: Costs, by_rank: bool) -> None:
        self.lengths, self.topology, self.costs, self.by_rank = lengths, topology, costs, by_rank
        self.slices = costs.heads
        self._ways: dict[tuple[int, int, int], tuple[list[int], Array]] = {}
        self._parts: dict[tuple[int, int], tuple[list[int], Array]] = {}
        self._of: dict[tuple[int, int, int], tuple[Array, Array]] = {}
        self._fewer: dict[float, Prices] = {}
        self.placed: dict[tuple[bytes, ...], tuple[Array, list[Array]]] = {}
        self.alone, _ = self.on_ranks(1, 1)
        self.level = float(self.alone.sum() / (1 / topology.seconds).sum())

    def with_slices(self, share: float) -> Prices:
        """The same if heads may be divided into fewer slices: into this share of their number."""
        if share not in self._fewer:
            fewer = self._fewer[share] = copy(self)
            fewer.slices, fewer._of = max(1, int(share * self.costs.heads)), {}
        return self._fewer[share]

    def on_ranks(self, nodes: int, each: int) -> tuple[Array, Array]:
        """Seconds and quickest slices of each sequence on nodes · each ranks: (N,) each."""
        return self._quickest((nodes, each, -1), self.lengths, nodes, each)

    def over_nodes(self, i: int) -> tuple[Array, Array]:
        """Seconds and quickest slices of sequence i on 1, 2, 3, … nodes: (nodes,) each."""
        each, n = self.topology.ranks_per_node, int(self.lengths[i])
        return self._quickest((0, each, n), np.array(n), 1 + np.arange(self.topology.nodes), each)

    def _quickest(
        self, key: tuple[int, int, int], n: Array, nodes: Array | int, each: int
    ) -> tuple[Array, Array]:
        """Seconds of sequences of n tokens on nodes · each ranks, and the quickest slices.

        Args:
            key: by which the answer is remembered.
            n: (N,) or (), tokens.
            nodes: one number, or (groups,) if n is ().

        Returns:
            seconds and numbers of slices, the shape that n and nodes broadcast to.
        """
        if key not in self._of:
            if key not in self._ways:
                self._ways[key] = self._by_slices(n, nodes, each)
            ways, seconds = self._ways[key]
            allowed = seconds[: sum(h <= self.slices for h in ways)]
            best = allowed.argmin(axis=0)
            self._of[key] = allowed.min(axis=0), np.array(ways)[best]
        return self._of[key]

    def together(
        self, nodes: int, each: int, which: Array, slices: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[float, int]:
        """Seconds of sequences that share one exchange on such a group, and the quickest slices.

        Transfers of some overlap the arithmetic of others, and each message waits once.

        Args:
            which: the sequences, by place in the batch.
            slices: how many there must be, as a share of the ranks or of the heads if they are
                fewer, and how many there may be, as a share of the heads.
        """
        if (nodes, each) not in self._parts:
            ways = [h for h in self.costs.slice_counts(each) if nodes * each % h == 0]
            costs = replace(self.costs, latency_inside=0.0, latency_between=0.0)
            parts = [
                np.stack(costs.ring_parts(self.lengths, nodes, each, h, self.by_rank)) for h in ways
            ]
            self._parts[nodes, each] = ways, np.stack(parts)  # (ways, 3, N)
        ways, each_part = self._parts[nodes, each]
        heads, size = self.costs.heads, nodes * each
        most = sum(h <= max(1, slices[1] * heads) for h in ways)
        least = min(sum(h < slices[0] * min(size, heads) for h in ways), most - 1)
        seconds = self.costs.ring_total(*each_part[least:most, :, which].sum(axis=2).T)
        best = int(seconds.argmin())
        return float(seconds[best]), ways[least + best]

    def _by_slices(self, n: Array, nodes: Array | int, each: int) -> tuple[list[int], Array]:
        """Numbers of slices, rising, and seconds with each of them, (ways, …)."""
        size = nodes * np.asarray(each)
        ways, found = [], []
        for h in self.costs.slice_counts(each):
            fits = (size % h == 0) & (size >= h)
            if fits.any():
                rounded = np.where(fits, nodes, max(1, h // each))
                seconds = self.costs.ring_seconds(n, rounded, each, h, self.by_rank)
                ways.append(h)
                found.append(np.where(fits, seconds, np.inf))
        return ways, np.stack(found)
