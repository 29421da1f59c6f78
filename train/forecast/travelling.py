"""Rows that travel to experts and back, on meta tensors: as many as even routing sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.experts import by_expert
from parallel.travel.homes import Homes
from parallel.travel.rows import Local, Rows


class ImaginedRows(Rows):
    """Of the rank that has most experts.

    Any `chosen` experts of a token are as likely as others, and every rank has as many tokens.

    Args:
        load: rows of this rank's experts, in units of the mean; None if it has no other ranks'
            tokens, but as many rows: what it holds then without any travel.
    """

    def __init__(self, homes: Homes, either: bool, load: float | None) -> None:
        super().__init__(homes, homes.fullest, None, torch.device("meta"), either)
        self.load = load
        self._tokens = self._chosen = 0
        self._sent: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def begin(
        self, x: Tensor, experts: Tensor, weights: Tensor, matrices: Sequence[Tensor]
    ) -> Callable[[Local], Tensor]:
        self._tokens, self._chosen = experts.shape
        if self.load is None:
            told = by_expert(experts, weights, self.here)
            return lambda local: local(x, *told, *matrices)
        return super().begin(x, experts, weights, matrices)

    def _told(self, mine: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        key = self._tokens, self._chosen
        if key not in self._sent:
            self._sent[key] = self._even()
        return self._sent[key]

    def _even(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        homes, topology, rank = self.homes, self.homes.topology, self.rank
        ranks, load = np.arange(self.ranks), self.load or 1.0
        pairs, rows, between = np.zeros((3, self.ranks, self.ranks))
        seen = homes.seen_from(0)
        for source in range(self.ranks):
            seen = homes.seen_from(source) if homes.replicated else seen
            held = np.bincount(seen, minlength=self.ranks)  # experts by the home of their rows
            of_nodes = np.bincount(topology.node(ranks), held).astype(np.int64)
            pairs[source] = homes.chance(held, self._chosen)
            rows[source] = held * self._chosen / homes.experts
            proxies = homes.proxy(source, topology.first)  # (nodes,)
            between[source, proxies] = homes.chance(of_nodes, self._chosen)
        # This rank's own tokens are what they are, so that it sends no more rows than it has.
        others = ranks != rank
        pairs[others, rank] = np.minimum(1.0, load * pairs[others, rank])
        rows[:, rank] *= load
        between[others, rank] *= load
        between *= self._tokens
        # No proxy sends on more than came to it.
        between[others] = np.ceil(between[others])
        pairs, rows = self._tokens * pairs, self._tokens * rows
        return pairs.astype(np.int64), rows.astype(np.int64), between.astype(np.int64)
