"""Which ranks hold which experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
    def groups(self) -> list[list[int]]:
        """The ranks that hold the same, for every run of experts."""
        ranks = range(self.topology.ranks)
        return [group for rank in ranks if (group := self.replicas(rank))[0] == rank]

    def seen_from(self, rank: int) -> np.ndarray:
        """int64 (experts,): the home to which `rank` sends rows of each expert.

        Of several one on the rank's own node, if there is any, and ranks spread over them.
        """
        firsts, lasts = self.bounds.T
        if not self.replicated:
            return np.repeat(np.arange(len(firsts)), lasts - firsts)
        node, number = self.topology.node(np.arange(len(firsts))), self._numbers[rank]
        homes = []
        for expert in range(self.experts):
            every = np.flatnonzero(firsts == expert)
            near = every[node[every] == node[rank]]
            among = near if len(near) else every
            homes.append(among[number % len(among)])
        return np.array(homes)

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Each rank's number on its node."""
        ranks = np.arange(self.topology.ranks)
        return ranks - self.topology.first[self.topology.node(ranks)]
