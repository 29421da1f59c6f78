"""Which ranks hold which sequences in full attention, and the simple placings.

A *placing* assigns each sequence of a batch to one rank or to a ring. Here are those that need one
pass over the batch; the balanced one is in `parallel.planning.placing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from parallel.planning.layout import Array, Topology
from parallel.planning.prices import Prices


@dataclass
class Owners:
    """A placing.

    Attributes:
        owner: int64 (N,), by place in the batch: the rank that holds the sequence whole, or
            −1 − i if ring i does.
        grids: the ranks of each ring, int64 (nodes, seats a node, slices) as in `Ring.ranks`.
        shards: sizes of the stream's shards. "even": all equal; "node": a node's shards hold as
            many tokens as attention has there, evenly; "rank": each rank's shard holds as many.
    """

    owner: Array
    grids: list[Array] = field(default_factory=list)
    shards: Literal["even", "node", "rank"] = "even"

    def flat(self) -> Owners:
        """The same with single rings for double ones: keys step from rank to rank, by number."""
        return replace(self, grids=[x.reshape(1, -1, x.shape[2]) for x in self.grids])

    @property
    def pieces(self) -> int:
        """How many pieces all sequences together are in: a ring's have one for each member."""
        sizes = np.append([x.size for x in self.grids], 1)  # index −1: whole sequences
        return int(sizes[np.maximum(-1 - self.owner, -1)].sum())

    @property
    def key(self) -> bytes:
        """Equal for equal placings."""
        shapes = repr([self.shards, *(x.shape for x in self.grids)]).encode()
        return b"".join([shapes, *(x.tobytes() for x in (self.owner, *self.grids))])


def on_all_ranks(count: int, topology: Topology, prices: Prices | None = None) -> Owners:
    """Every sequence on one ring of all ranks, with the quickest number of slices by `prices`.

    Without prices heads stay together.
    """
    ranks = np.arange(topology.ranks)
    rows, each, _ = grid(ranks, topology).shape
    slices = prices.best_slices(rows, each) if prices is not None else 1
    return Owners(np.full(count, -1), [grid(ranks, topology, slices)])


def on_stream_ranks(lengths: Array, bounds: Array, topology: Topology) -> Owners:
    """Each sequence on the ranks whose shards hold it when the batch is cut at `bounds`.

    Args:
        bounds: int (ranks + 1,), of `ordering.shard_bounds`.
    """
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    first = np.searchsorted(bounds, cu_seqlens[:-1], side="right") - 1
    first = first.clip(0, topology.ranks - 1)
    last = np.maximum(first, np.searchsorted(bounds, cu_seqlens[1:], side="left") - 1)
    rings: dict[tuple[int, int], int] = {}
    owner = first.copy()
    for i in np.flatnonzero(last > first):
        owner[i] = -1 - rings.setdefault((int(first[i]), int(last[i])), len(rings))
    return Owners(owner, [grid(np.arange(a, b + 1), topology) for a, b in rings])


def on_fewest_ranks(prices: Prices, slack: float) -> Owners:
    """Each sequence on the fewest ranks with room for it, where its tokens stay in all layers.

    Longest first; among groups with room, the least busy one takes it (longest-processing-time
    scheduling). Group sizes are powers of two, or all ranks. This is the placing of hybrid data
    parallelism (ByteScale, arXiv 2502.21231): only rings, and states of cut sequences, send
    anything; in return work is less even.

    Args:
        slack: by which fraction a rank's tokens may exceed the even share.
    """
    lengths, topology = prices.lengths, prices.topology
    limit = rank_capacity(lengths, topology, slack)
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
        # (ranks,) -> (groups, size) -> (groups,)
        most, filled = (x[: groups * size].reshape(groups, size).max(axis=1) for x in (busy, held))
        first = int(np.lexsort((most, filled + n / size > limit))[0]) * size
        members = np.arange(first, first + size)
        rows, width, _ = grid(members, topology).shape
        seconds, slices = (x[i] for x in prices.on_ranks(rows, width))
        slowest = float(topology.seconds[members].max())
        busy[members] = most[first // size] + (seconds + rest * n / size) * slowest
        held[members] += n / size
        if (first, size) not in rings:
            rings[first, size] = len(grids)
            grids.append(grid(members, topology, int(slices)))
        owner[i] = -1 - rings[first, size]
    work = prices.alone + rest * lengths
    for i in by_length[shared:]:
        late = busy + work[i] * topology.seconds
        rank = int(np.where(held + lengths[i] <= limit, late, np.inf).argmin())
        owner[i] = rank
        busy[rank] = late[rank]
        held[rank] += lengths[i]
    return Owners(owner, grids, "rank")


def grid(ranks: Array, topology: Topology, slices: int = 1) -> Array:
    """Adjacent ranks as a ring's grid: (ranks,) -> (rows, seats a row, slices).

    A row is a node's ranks. If nodes have different numbers of them, it is the greatest common
    divisor of these numbers.
    """
    _, counts = np.unique(topology.node(ranks), return_counts=True)
    width = int(np.gcd.reduce(counts))
    if width == 1:  # one rank a row would be a single ring: say so by one row
        width = len(ranks)
    return ranks.reshape(-1, max(1, width // slices), slices)


def rank_capacity(lengths: Array, topology: Topology, slack: float) -> float:
    """Tokens that a rank may hold: the even share and a fraction `slack` more, rounded up."""
    return float(np.ceil((1 + slack) * lengths.sum() / topology.ranks))
