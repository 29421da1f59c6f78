"""Who holds what in full attention, and the placings that weigh little or nothing.

`parallel.planning.placing` has the one that does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from parallel.planning.layout import Array, Topology
from parallel.planning.prices import Prices


@dataclass
class Owners:
    """Who holds what in full attention.

    Attributes:
        owner: int64 (N,), by place in the batch: a rank that holds the sequence whole, or
            −1 − i for ring i.
        grids: the ranks of each ring, int64 (nodes, seats a node, slices): see `Ring`.
        shards: of the stream: even, or as large as what attention has on each node or rank.
    """

    owner: Array
    grids: list[Array] = field(default_factory=list)
    shards: Literal["even", "node", "rank"] = "even"

    def flat(self) -> Owners:
        """The same with rings that know no nodes: keys step from rank to rank."""
        return replace(self, grids=[x.reshape(1, -1, x.shape[2]) for x in self.grids])

    @property
    def pieces(self) -> int:
        """How many there are, of all sequences."""
        sizes = np.append([x.size for x in self.grids], 1)  # the last one is of whole sequences
        return int(sizes[np.maximum(-1 - self.owner, -1)].sum())

    @property
    def key(self) -> bytes:
        """Alike for placings that are alike."""
        shapes = repr([self.shards, *(x.shape for x in self.grids)]).encode()
        return b"".join([shapes, *(x.tobytes() for x in (self.owner, *self.grids))])


def everywhere(count: int, topology: Topology, prices: Prices | None = None) -> Owners:
    """Every sequence on all ranks; heads are split as makes it quickest, if prices are given."""
    ranks = np.arange(topology.ranks)
    rows, each, _ = grid(ranks, topology).shape
    slices = prices.together(rows, each) if prices is not None else 1
    return Owners(np.full(count, -1), [grid(ranks, topology, slices)])


def where_they_lie(lengths: Array, bounds: Array, topology: Topology) -> Owners:
    """Each sequence on the ranks whose shards, ending at `bounds`, hold it in the batch's order."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    first = np.searchsorted(bounds, cu_seqlens[:-1], side="right") - 1
    first = first.clip(0, topology.ranks - 1)
    last = np.maximum(first, np.searchsorted(bounds, cu_seqlens[1:], side="left") - 1)
    rings: dict[tuple[int, int], int] = {}
    owner = first.copy()
    for i in np.flatnonzero(last > first):
        owner[i] = -1 - rings.setdefault((int(first[i]), int(last[i])), len(rings))
    return Owners(owner, [grid(np.arange(a, b + 1), topology) for a, b in rings])


def undivided(prices: Prices, slack: float) -> Owners:
    """Each sequence on the fewest ranks whose memory has room for it, the longest first to those
    that have least to do, and its tokens stay there in all layers.

    The placing of hybrid data parallelism (ByteScale, arXiv 2502.21231): nothing is sent but on
    rings, for which ranks are less even.
    """
    lengths, topology = prices.lengths, prices.topology
    limit = room(lengths, topology, slack)
    rest = prices.costs.rest_both_ways
    busy, held = np.zeros(topology.ranks), np.zeros(topology.ranks)
    owner = np.zeros(len(lengths), np.int64)
    grids: list[Array] = []
    rings: dict[tuple[int, int], int] = {}
    by_length = np.argsort(-lengths, kind="stable").tolist()
    shared = int((lengths > limit).sum())
    for i in by_length[:shared]:
        n, size = float(lengths[i]), 1
        while size < topology.ranks and n / size > limit:
            size = min(2 * size, topology.ranks)
        groups = topology.ranks // size
        most, filled = (x[: groups * size].reshape(groups, size).max(axis=1) for x in (busy, held))
        first = int(np.lexsort((most, filled + n / size > limit))[0]) * size
        members = np.arange(first, first + size)
        rows, width, _ = grid(members, topology).shape
        seconds, slices = (x[i] for x in prices.of(rows, width))
        busy[members] = most[first // size] + seconds + rest * n / size
        held[members] += n / size
        if (first, size) not in rings:
            rings[first, size] = len(grids)
            grids.append(grid(members, topology, int(slices)))
        owner[i] = -1 - rings[first, size]
    work = prices.alone + rest * lengths
    for i in by_length[shared:]:
        rank = int(np.where(held + lengths[i] <= limit, busy, np.inf).argmin())
        owner[i] = rank
        busy[rank] += work[i]
        held[rank] += lengths[i]
    return Owners(owner, grids, "rank")


def grid(ranks: Array, topology: Topology, slices: int = 1) -> Array:
    """Adjacent ranks of a ring as `Ring` has them; rows are parts of nodes if these give
    unequal numbers."""
    _, counts = np.unique(topology.node(ranks), return_counts=True)
    width = int(np.gcd.reduce(counts))
    if width == 1:  # rows of one rank would be a flat ring, stood on end
        width = len(ranks)
    return ranks.reshape(-1, max(1, width // slices), slices)


def room(lengths: Array, topology: Topology, slack: float) -> float:
    """Tokens that a rank may hold."""
    return float(np.ceil((1 + slack) * lengths.sum() / topology.ranks))
