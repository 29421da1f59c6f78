"""The stream: where tokens lie in every layer but full attention.

Those layers ask for even work and for little else: what a fragment needs from elsewhere is a
state, or a few tokens. So tokens stay on the node on which full attention wants them; only what
it holds beyond its shards crosses to others, and nothing does where shards are as large as that.
A sequence on a ring over nodes then lies on each of them in two runs, for zigzag gives each an
early part of it and a late one. The runs of a node are laid end to end over its ranks, so that few
sequences are cut there, but for those that are best left on their very rank: *pinned* ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.planning.layout import Array, Layout, Topology

_PIECE = 256  # tokens that a rank takes at least of what its node misses, if it misses as many
_AHEAD = 12  # runs among which one that ends at a shard's boundary is sought


class _Runs(NamedTuple):
    """Runs of tokens, each of one sequence and in one place; (runs,) each, none is empty.

    Attributes:
        sequence, start, end: int64, positions [start, end) of the sequence.
        holder: int64, who holds it: a rank, or a node.
        home: float64, the mean of the ranks on which its tokens are at home.
    """

    sequence: Array
    start: Array
    end: Array
    holder: Array
    home: Array

    @property
    def size(self) -> Array:
        return self.end - self.start

    def at(self, rows: Array) -> _Runs:
        return _Runs(*(column[rows] for column in self))

    def joined(self) -> _Runs:
        """By sequence and position; neighbours in one place are one run."""
        runs = self.at(np.lexsort((self.start, self.sequence)))
        apart = np.ones(len(runs.start), bool)
        apart[1:] = (
            (runs.sequence[1:] != runs.sequence[:-1])
            | (runs.start[1:] != runs.end[:-1])
            | (runs.holder[1:] != runs.holder[:-1])
        )
        first = np.flatnonzero(apart)
        size = np.add.reduceat(runs.size, first)
        home = np.add.reduceat(runs.home * runs.size, first) / size
        joined = runs.at(first)
        return joined._replace(end=joined.start + size, home=home)

    def cut(self, edges: Array) -> tuple[_Runs, Array]:
        """The same, cut at tokens counted from the beginning of all, laid end to end.

        Returns:
            The pieces, and how many tokens come before each.
        """
        before = np.cumsum(self.size) - self.size
        total = int(self.size.sum())
        at = np.union1d(before, edges[(edges >= 0) & (edges < total)])
        row = np.searchsorted(before, at, side="right") - 1
        pieces = self.at(row)
        start = pieces.start + at - before[row]
        return pieces._replace(start=start, end=start + np.diff(at, append=total)), at

    def dealt(self, room: Array) -> _Runs:
        """The same end to end over holders 0, 1, … that take so many tokens each."""
        ends = np.cumsum(room)
        pieces, at = self.cut(ends)
        return pieces._replace(holder=np.searchsorted(ends, at, side="right"))

    def parted(self, room: Array) -> tuple[_Runs, _Runs]:
        """What holders have room for, and the rest: the shortest of the sequences that they
        hold whole go first, so that few are cut."""
        whole = np.bincount(self.sequence)[self.sequence] == 1
        runs = self.at(np.lexsort((-self.size, whole, self.holder)))
        held = np.bincount(runs.holder, runs.size, len(room)).astype(np.int64)
        ends = np.cumsum(held) - held + np.minimum(room, held)
        pieces, at = runs.cut(ends)
        rest = at >= ends[pieces.holder]
        return pieces.at(~rest), pieces.at(rest)

    def beside(self, *others: _Runs) -> _Runs:
        return _Runs(*(np.concatenate(columns) for columns in zip(self, *others, strict=True)))

    def layout(self, ranks: int) -> Layout:
        """Each rank's, fragments that began elsewhere first."""
        runs = self.joined()
        sequence, start, end, rank, _ = runs.at(np.argsort(runs.start == 0, kind="stable"))
        return Layout.stack(sequence, start, end, rank, ranks)


def shard_bounds(tokens: int, ranks: int) -> Array:
    """int64 (ranks + 1,): where the shards of a stream begin and end; sizes differ by ≤ 1."""
    return np.arange(ranks + 1) * tokens // ranks


def in_order(lengths: Array, ranks: int) -> Layout:
    """The stream of sequences end to end in their order: rank r holds the r-th of equal shards."""
    sequence = np.flatnonzero(lengths)
    zero = np.zeros_like(sequence)
    runs = _Runs(sequence, zero, lengths[sequence], zero, zero)
    return runs.dealt(np.diff(shard_bounds(int(lengths.sum()), ranks))).layout(ranks)


def even_shards(held: Array) -> Array:
    """int64 (ranks,): the sizes of even shards, those a token larger where most is held."""
    share, larger = np.divmod(int(held.sum()), len(held))
    shards = np.full(len(held), share)
    shards[np.argsort(-held, kind="stable")[:larger]] += 1
    return shards


def node_shards(held: Array, topology: Topology) -> Array:
    """int64 (ranks,): the sizes of shards where no token leaves its node, even on each."""
    first = np.arange(topology.ranks_per_node, topology.ranks, topology.ranks_per_node)
    return np.concatenate([even_shards(of_node) for of_node in np.split(held, first)])


def near_home(
    home: Layout, topology: Topology, shards: Array, pinned: Array, routing: bool
) -> Layout:
    """The stream of tokens that stay where they are at home, as far as shards have room.

    Args:
        home: holds every token once, with all its heads.
        shards: int64 (ranks,), tokens of each; as many as `home` has in all.
        pinned: bool (N,), the sequences whose tokens stay on their rank, not on their node only:
            fewer move, but rings leave more fragments.
        routing: what a node misses is taken by all its ranks, so that it comes over all NICs.
    """
    ranks = np.arange(topology.ranks)
    node = ranks // topology.ranks_per_node
    room = shards.copy()
    at_home = _Runs(home.sequence, home.start, home.end, home.rank, home.rank.astype(float))
    fixed = at_home.at(pinned[home.sequence])
    loose = at_home.at(~pinned[home.sequence])
    loose = loose._replace(holder=node[loose.holder]).joined()
    fixed, excess = fixed.parted(room)
    loose = loose.beside(excess._replace(holder=node[excess.holder]))
    room -= np.bincount(fixed.holder, fixed.size, topology.ranks).astype(np.int64)
    of_node = np.bincount(node, room).astype(np.int64)
    loose, surplus = loose.parted(of_node)
    missing = of_node - np.bincount(loose.holder, loose.size, topology.nodes).astype(np.int64)
    taken = _takers(missing, room, node, routing)
    surplus = surplus.dealt(taken)
    room -= taken

    first = loose.holder * topology.ranks_per_node
    near = np.clip(loose.home, first - 0.5, first + topology.ranks_per_node - 0.5)
    loose = loose.at(np.lexsort((loose.size, near, loose.holder)))
    loose = loose.at(_spare(loose.size, loose.holder, np.append(0, np.cumsum(room))))
    return fixed.beside(surplus, loose.dealt(room)).layout(topology.ranks)


def _takers(missing: Array, room: Array, node: Array, routing: bool) -> Array:
    """How many tokens each rank takes of those that its node misses.

    With routing all take alike, so that tokens come over all NICs, but for pieces too small to
    be worth it; else the first ones take them.
    """
    if not routing:
        before = np.cumsum(room) - room
        return np.clip(missing[node] - before + before[np.searchsorted(node, node)], 0, room)
    local = np.arange(len(node)) - np.searchsorted(node, node)
    some = np.where(local < np.maximum(missing // _PIECE, 1)[node], room, 0)
    some = np.where((np.bincount(node, some) >= missing)[node], some, room)
    of_node = np.bincount(node, some).astype(np.int64)
    upto = np.cumsum(some) - (np.cumsum(of_node) - of_node)[node]
    wanted, all_ = missing[node], np.maximum(of_node, 1)[node]
    return upto * wanted // all_ - (upto - some) * wanted // all_


def _spare(size: Array, node: Array, bounds: Array) -> Array:
    """Places in a new order in which runs end at the shards' boundaries where they can.

    `node` rises; runs change places only among those of one node.
    """
    total = int(bounds[-1])
    due = list(range(len(size)))
    sizes = size.tolist()
    ends = np.searchsorted(node, node, side="right").tolist()
    order: list[int] = []
    at, begin = 0, 0
    boundary = iter(bounds[1:].tolist())
    gap = next(boundary)
    while begin < len(due):
        while at >= gap and gap < total:
            gap = next(boundary)
        ahead = due[begin : min(begin + _AHEAD, ends[begin])]
        room = gap - at
        first: dict[int, int] = {}
        chosen: tuple[int, ...] = (0,)
        for place, i in enumerate(ahead):
            if sizes[i] == room:
                chosen = (place,)
                break
            if (mate := first.get(room - sizes[i])) is not None:
                chosen = (mate, place)
                break
            first.setdefault(sizes[i], place)
        else:
            # Nothing ends here; a run that stays within the shard goes before one that
            # would be cut.
            chosen = (next((place for place, i in enumerate(ahead) if sizes[i] < room), 0),)
        for place in chosen:
            order.append(ahead[place])
            at += sizes[ahead[place]]
        kept = [i for place, i in enumerate(ahead) if place not in chosen]
        begin += len(chosen)
        due[begin : begin + len(kept)] = kept
    return np.array(order, dtype=np.int64)
