"""What each sequence of a batch costs on the groups of ranks that it may be placed on."""

from __future__ import annotations

import numpy as np

from parallel.planning.costs import Costs
from parallel.planning.layout import Array, Topology


class Prices:
    """What sequences cost on the groups of ranks that a batch may be placed on; made once.

    Args:
        slices: into how many parts heads may be split, as a share of their number.

    Attributes:
        alone: float64 (N,), seconds of each sequence on one rank.
        level: seconds of a rank if all were even.
    """

    def __init__(
        self,
        lengths: Array,
        topology: Topology,
        costs: Costs,
        settled: bool,
        slices: float = 1.0,
    ) -> None:
        self.lengths, self.topology, self.costs, self.settled = lengths, topology, costs, settled
        self.slices = max(1, int(slices * costs.heads))
        self.alone, _ = self.on(lengths, 1, 1)
        self.level = float(self.alone.sum()) / topology.ranks
        self._of: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._over: dict[int, tuple[Array, Array]] = {}

    def on(self, n: Array, nodes: Array | int, each: int) -> tuple[Array, Array]:
        """Seconds of n tokens on nodes · each ranks, and the slices that make them fewest."""
        ways, seconds = self._by_slices(n, nodes, each)
        best = seconds.argmin(axis=0)
        return np.take_along_axis(seconds, best[None], axis=0)[0], np.array(ways)[best]

    def together(self, nodes: int, each: int) -> int:
        """The slices that make all sequences quickest where nodes · each ranks share each."""
        ways, seconds = self._by_slices(self.lengths, nodes, each)
        return ways[int(seconds.sum(axis=1).argmin())]

    def _by_slices(self, n: Array, nodes: Array | int, each: int) -> tuple[list[int], Array]:
        """The numbers of slices, and seconds of n tokens with each of them."""
        size = nodes * np.asarray(each)
        found = []
        ways = [h for h in self.costs.ways(each) if h <= self.slices]
        for h in ways:
            fits = (size % h == 0) & (size >= h)
            rounded = np.where(fits, nodes, max(1, h // each))
            seconds = self.costs.shared(n, rounded, each, h, self.settled)
            found.append(np.where(fits, seconds, np.inf))
        return ways, np.stack(found)

    def of(self, nodes: int, each: int) -> tuple[Array, Array]:
        """Of each sequence on nodes · each ranks: seconds and slices, (N,) each."""
        if (nodes, each) not in self._of:
            self._of[nodes, each] = self.on(self.lengths, nodes, each)
        return self._of[nodes, each]

    def over(self, i: int) -> tuple[Array, Array]:
        """Of sequence i on 1, 2, 3, … nodes: seconds and slices, (nodes,) each."""
        n = int(self.lengths[i])
        if n not in self._over:
            nodes = np.arange(1, self.topology.nodes + 1)
            self._over[n] = self.on(np.array(n), nodes, self.topology.ranks_per_node)
        return self._over[n]
