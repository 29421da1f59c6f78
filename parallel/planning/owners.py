"""Which ranks hold which sequences in full attention, and the simple placings.

A *placing* assigns each sequence of a batch to one rank or to a ring. Here are those that need one
pass over the batch; the balanced one is in `parallel.planning.placing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from parallel.planning.costs import ATTENTION_WORK, Costs
from parallel.planning.layout import Array, Topology
from parallel.planning.prices import Prices
from parallel.planning.rings import Members

# Multiples of the even share of all work in which a sequence is to be done (`group_sizes`).
_SHARES = (0.5, 0.75, 1.0, 1.25, 1.6)
# Into how many slices a group may divide heads (`Prices.together`): as many as is quickest, a
# quarter of the heads, none, so that there are rings only, or all, so that there are none.
_SLICES = ((0.0, 1.0), (0.0, 0.25), (0.0, 0.0), (1.0, 1.0))


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
    _, slices = prices.together(rows, each, np.arange(count)) if prices is not None else (0.0, 1)
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


def group_sizes(prices: Prices, slack: float) -> list[tuple[float, Array]]:
    """Ways to give each sequence a number of adjacent ranks on which it stays in all layers.

    Each takes the fewest ranks with room for it (ByteScale, arXiv 2502.21231), and at least as many
    as a group of one size has (data parallelism over context parallelism), or as it takes to be
    done in a multiple of the even share of all work (FlexSP, arXiv 2412.01523). Numbers are powers
    of two, or all ranks.

    Args:
        slack: by which fraction a rank's tokens may exceed the even share.

    Returns:
        For each way seconds that no such step is shorter than, by estimate, and int64 (N,), ranks
        of each sequence. Shortest first.
    """
    lengths, ranks = prices.lengths, prices.topology.ranks
    room = rank_capacity(lengths, prices.topology, slack)
    work = prices.alone + prices.costs.rest_both_ways * lengths
    even = float(work.sum() / (1 / prices.topology.seconds).sum())
    sizes = [1 << i for i in range(ranks.bit_length()) if 1 << i < ranks] + [ranks]
    steps = np.array(sizes)
    roomy = np.searchsorted(steps * room, lengths).clip(0, len(sizes) - 1)
    timely = [
        np.searchsorted(steps * share * even, work).clip(0, len(sizes) - 1) for share in _SHARES
    ]
    fewest = [np.full(len(lengths), k) for k, size in enumerate(sizes) if ranks % size == 0]
    ways = {x.tobytes(): x for x in (np.maximum(roomy, least) for least in (*fewest, *timely))}
    found = []
    takes = np.stack([_on_groups(prices, size) for size in sizes])
    for way in ways.values():
        total = prices.costs.rest_both_ways * float(lengths.sum())
        for k in np.unique(way).tolist():
            rows, width, _ = grid(np.arange(sizes[k]), prices.topology).shape
            total += sizes[k] * prices.together(rows, width, np.flatnonzero(way == k))[0]
        longest = float(np.take_along_axis(takes, way[None], axis=0).max(initial=0.0))
        found.append((max(total / ranks, longest), steps[way]))
    return sorted(found, key=lambda each: each[0])


def _on_groups(prices: Prices, size: int) -> Array:
    """float64 (N,): seconds of each sequence and of its other work on each of so many ranks."""
    rows, width, _ = grid(np.arange(size), prices.topology).shape
    rest = prices.costs.rest_both_ways * prices.lengths / size
    return prices.on_ranks(rows, width)[0] + rest


def in_groups(prices: Prices, sizes: Array, slack: float) -> list[Owners]:
    """Each sequence on as many adjacent ranks as it is given, where it stays in all layers.

    Longest first; among groups with room, the least busy one takes it (longest-processing-time
    scheduling). Only rings, and states of cut sequences, send anything; in return work is less
    even.

    Args:
        sizes: int64 (N,), of `group_sizes`. Where no group of its size has room, a sequence takes
            one of twice as many ranks.
        slack: by which fraction a rank's tokens may exceed the even share.

    Returns:
        The placing with each of `_SLICES`; none if a rank would have too many tokens.
    """
    lengths, topology = prices.lengths, prices.topology
    limit = rank_capacity(lengths, topology, slack)
    busy, held, shared = (np.zeros(topology.ranks) for _ in range(3))
    owner = np.zeros(len(lengths), np.int64)
    takes: dict[int, Array] = {}
    rings: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(-lengths, kind="stable").tolist():
        n, size = float(lengths[i]), int(sizes[i])
        while True:
            within = slice(topology.ranks // size * size)
            most, filled = busy, held
            if size > 1:  # (ranks,) -> (groups, size) -> (groups,)
                most, filled = (x[within].reshape(-1, size).max(axis=1) for x in (busy, held))
            full = filled + n / size > limit
            if size == topology.ranks or not full.all():
                break
            size = min(2 * size, topology.ranks)  # more ranks have room for it together
        if size not in takes:
            takes[size] = _on_groups(prices, size)
        if size == 1:
            late = busy + takes[1][i] * topology.seconds
            rank = int(np.where(full, np.inf, late).argmin())
            owner[i], busy[rank] = rank, late[rank]
            held[rank] += n
            continue
        group = int(np.lexsort((most, full))[0])
        mine = slice(group * size, (group + 1) * size)
        busy[mine] = most[group] + takes[size][i] * topology.seconds[mine].max()
        held[mine] += n / size
        shared[mine] += 1
        rings.setdefault((group * size, size), []).append(i)
    if (held > limit + 2 * shared).any():  # chunks are rounded
        return []
    grids: list[list[Array]] = [[] for _ in _SLICES]
    for ring, ((first, size), sequences) in enumerate(rings.items()):
        members, which = np.arange(first, first + size), np.array(sequences)
        rows = grid(members, topology)[:, :, 0]
        width = rows.shape[1]
        owner[which] = -1 - ring
        for found, share in zip(grids, _SLICES, strict=True):
            found.append(sliced(rows, prices.together(len(rows), width, which, share)[1]))
    return [Owners(owner, each, "rank") for each in grids]


def least_seconds(owners: Owners, lengths: Array, topology: Topology, costs: Costs) -> float:
    """Seconds that no plan of a placing is quicker than, as `cost.price` counts them.

    The busiest rank's attention and other work. Left out is whatever depends on where the stream
    has the tokens (moves, states), and that rings wait for each other. Sequences of a ring are in
    even chunks here: rounded, they may be a few tokens shorter or longer.
    """
    ranks = topology.ranks
    whole = owners.owner >= 0
    rank, n = owners.owner[whole], lengths[whole]
    alone = ATTENTION_WORK.sum() * costs.attention(np.zeros_like(n), n)
    busy = np.bincount(rank, alone, ranks) * topology.seconds
    held = np.bincount(rank, n, ranks).astype(np.float64)
    if owners.grids:
        members = Members.of(owners.grids, topology)
        ring, n = -1 - owners.owner[~whole], lengths[~whole]
        seats = members.size // members.shapes[:, 2]
        chunks = np.where(seats == 1, 1, 2 * seats)[ring]
        work, tokens = (
            np.bincount(ring, x, len(members.size)) / members.size
            for x in (costs.chunks(n // chunks, chunks), n)
        )
        slowest = members.largest(topology.seconds[members.rank])
        took = members.seconds(work * slowest, tokens * costs.kv_bytes, costs).sum(axis=0)
        busy += np.bincount(members.rank, took[members.ring], ranks)
        held += np.bincount(members.rank, tokens[members.ring], ranks)
    match owners.shards:
        case "even":
            held = lengths.sum() / np.array(topology.speeds).sum()
        case "node":
            power = 1 / topology.seconds
            node = topology.node(np.arange(ranks))
            held = (np.bincount(node, held) / np.bincount(node, power))[node]
        case "rank":
            held = held * topology.seconds
    return float((busy + costs.rest_both_ways * held).max())


def grid(ranks: Array, topology: Topology, slices: int = 1) -> Array:
    """Adjacent ranks as a ring's grid: (ranks,) -> (rows, seats a row, slices).

    A row is a node's ranks. If nodes have different numbers of them, it is the greatest common
    divisor of these numbers.
    """
    _, counts = np.unique(topology.node(ranks), return_counts=True)
    width = int(np.gcd.reduce(counts))
    if width == 1:  # one rank a row would be a single ring: say so by one row
        width = len(ranks)
    return sliced(ranks.reshape(-1, width), slices)


def sliced(rows: Array, slices: int) -> Array:
    """A grid whose seats divide heads into slices: (rows, ranks a row) -> (rows, seats, slices).

    If there are more slices than ranks in a row, a seat takes several rows.
    """
    return rows.reshape(-1, max(1, rows.shape[1] // slices), slices)


def rank_capacity(lengths: Array, topology: Topology, slack: float) -> float:
    """Tokens that a rank may hold: the even share and a fraction `slack` more, rounded up."""
    return float(np.ceil((1 + slack) * lengths.sum() / topology.ranks))
