"""The stream: where tokens lie in every layer but full attention.

In those layers a fragment needs little from other ranks: a state, or a few tokens. Only even work
matters, so tokens stay on the node where full attention holds them (their *home*), and only what a
node holds beyond the sum of its shards goes to other nodes.

On a node, runs of tokens are laid end to end over its ranks, in an order in which few sequences
are cut. *Pinned* sequences are the exception: their tokens stay on their rank.

A sequence on a ring over nodes is in two runs on each node, since zigzag gives each node an early
part of it and a late one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.planning.layout import Array, Layout, Topology

# Tokens of other nodes' surplus that a rank takes at least, unless its node takes fewer: smaller
# pieces are not worth a message of their own.
_LEAST_TAKEN = 256
# How many of the next runs are searched for one that ends at a shard's boundary.
_LOOKAHEAD = 12


class _Runs(NamedTuple):
    """A table of runs of tokens, each of one sequence on one holder; columns (runs,), none empty.

    Attributes:
        sequence, start, end: int64, positions [start, end) of the sequence.
        holder: int64, the rank that holds the run, or the node.
        home: float64, mean of the ranks (their numbers) that hold its tokens in attention.
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
        """Sorted by sequence and position; runs that adjoin on one holder become one run."""
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
        """The same runs, laid end to end and cut at `edges`, counted in tokens from the first.

        Returns:
            The pieces, and int64 (pieces,), how many tokens come before each.
        """
        before = np.cumsum(self.size) - self.size
        total = int(self.size.sum())
        at = np.union1d(before, edges[(edges >= 0) & (edges < total)])
        row = np.searchsorted(before, at, side="right") - 1
        pieces = self.at(row)
        start = pieces.start + at - before[row]
        return pieces._replace(start=start, end=start + np.diff(at, append=total)), at

    def laid_end_to_end(self, room: Array) -> _Runs:
        """The same runs, laid end to end over holders 0, 1, … with room for room[0], … tokens."""
        ends = np.cumsum(room)
        pieces, at = self.cut(ends)
        return pieces._replace(holder=np.searchsorted(ends, at, side="right"))

    def split_by_room(self, room: Array) -> tuple[_Runs, _Runs]:
        """Divide each holder's runs into what fits in its `room` (holders,) and the rest.

        The rest takes sequences that lie in one run first, the shortest before the longer ones, so
        that few sequences are cut.
        """
        whole = np.bincount(self.sequence)[self.sequence] == 1
        runs = self.at(np.lexsort((-self.size, whole, self.holder)))
        held = np.bincount(runs.holder, runs.size, len(room)).astype(np.int64)
        ends = np.cumsum(held) - held + np.minimum(room, held)
        pieces, at = runs.cut(ends)
        rest = at >= ends[pieces.holder]
        return pieces.at(~rest), pieces.at(rest)

    def concatenated(self, *others: _Runs) -> _Runs:
        return _Runs(*(np.concatenate(columns) for columns in zip(self, *others, strict=True)))

    def layout(self, ranks: int) -> Layout:
        """The layout of these runs, whose holders are ranks and which are all tokens.

        On each rank, middle runs of a sequence come first, then last ones, whole sequences and
        first runs.
        """
        runs = self.joined()
        length = np.zeros(int(runs.sequence.max(initial=-1)) + 1, np.int64)
        np.maximum.at(length, runs.sequence, runs.end)
        begins, ends = runs.start == 0, runs.end == length[runs.sequence]
        kind = np.where(begins, 3 - ends, ends)
        sequence, start, end, rank, _ = runs.at(np.argsort(kind, kind="stable"))
        return Layout.stack(sequence, start, end, rank, ranks)


def shard_bounds(tokens: int, ranks: int) -> Array:
    """int64 (ranks + 1,): bounds of equal shards of `tokens` tokens; sizes differ by ≤ 1."""
    return np.arange(ranks + 1) * tokens // ranks


def in_order(lengths: Array, ranks: int) -> Layout:
    """The sequences end to end in the batch's order; rank r holds the r-th of equal shards."""
    sequence = np.flatnonzero(lengths)
    zero = np.zeros_like(sequence)
    runs = _Runs(sequence, zero, lengths[sequence], zero, zero)
    return runs.laid_end_to_end(np.diff(shard_bounds(int(lengths.sum()), ranks))).layout(ranks)


def even_shards(held: Array, speeds: Array) -> Array:
    """int64 (ranks,): sizes of shards in proportion to the ranks' speeds; those that hold most take
    the odd tokens.

    Args:
        held: int64 (ranks,), tokens that each rank holds in attention.
        speeds: float64 (ranks,).
    """
    shards = (held.sum() * (speeds / speeds.sum()) + 1e-9).astype(np.int64)
    shards[np.argsort(-held, kind="stable")[: held.sum() - shards.sum()]] += 1
    return shards


def node_shards(held: Array, topology: Topology) -> Array:
    """int64 (ranks,): the same inside each node, which keeps its tokens."""
    nodes = (np.split(each, topology.first[1:]) for each in (held, 1 / topology.seconds))
    return np.concatenate([even_shards(*node) for node in zip(*nodes, strict=True)])


def near_home(
    home: Layout, topology: Topology, shards: Array, pinned: Array, routing: bool
) -> Layout:
    """The stream in which tokens stay at home as far as the shards have room.

    Four steps: pinned runs stay on their ranks; the others stay on their nodes; what does not fit
    fills the shards of nodes that miss tokens; a node's loose runs are laid end to end over the
    room that is left.

    Args:
        home: holds every token once, with all its heads.
        shards: int64 (ranks,), size of each shard; their sum is the number of tokens.
        pinned: bool (N,), sequences whose tokens stay on their rank instead of their node: fewer
            tokens move, but a ring's sequences are in more fragments.
        routing: all ranks of a node take part of what it misses, so that it comes over all NICs.
    """
    ranks = np.arange(topology.ranks)
    node = topology.node(ranks)
    room = shards.copy()
    at_home = _Runs(home.sequence, home.start, home.end, home.rank, home.rank.astype(float))
    fixed = at_home.at(pinned[home.sequence])
    loose = at_home.at(~pinned[home.sequence])
    loose = loose._replace(holder=node[loose.holder]).joined()
    fixed, excess = fixed.split_by_room(room)
    loose = loose.concatenated(excess._replace(holder=node[excess.holder]))
    room -= np.bincount(fixed.holder, fixed.size, topology.ranks).astype(np.int64)
    of_node = np.bincount(node, room).astype(np.int64)
    loose, surplus = loose.split_by_room(of_node)
    missing = of_node - np.bincount(loose.holder, loose.size, topology.nodes).astype(np.int64)
    taken = _share_missing(missing, room, node, routing)
    surplus = surplus.laid_end_to_end(taken)
    room -= taken

    first, size = topology.first[loose.holder], np.array(topology.sizes)[loose.holder]
    near = np.clip(loose.home, first - 0.5, first + size - 0.5)
    loose = loose.at(np.lexsort((loose.size, near, loose.holder)))
    loose = loose.at(_order_to_fill(loose.size, loose.holder, np.append(0, np.cumsum(room))))
    return fixed.concatenated(surplus, loose.laid_end_to_end(room)).layout(topology.ranks)


def _share_missing(missing: Array, room: Array, node: Array, routing: bool) -> Array:
    """int64 (ranks,): how many of the tokens that its node misses each rank takes.

    With routing, in proportion to their room, over no more ranks than give each `_LEAST_TAKEN`
    tokens (if those have the room). Without, the node's first ranks, until nothing is missing.

    Args:
        missing: int64 (nodes,), tokens that each node takes from others.
        room: int64 (ranks,), tokens that each rank can still take.
        node: int64 (ranks,), node of each rank.
    """
    if not routing:
        before = np.cumsum(room) - room
        return np.clip(missing[node] - before + before[np.searchsorted(node, node)], 0, room)
    local = np.arange(len(node)) - np.searchsorted(node, node)
    some = np.where(local < np.maximum(missing // _LEAST_TAKEN, 1)[node], room, 0)
    some = np.where((np.bincount(node, some) >= missing)[node], some, room)
    of_node = np.bincount(node, some).astype(np.int64)
    upto = np.cumsum(some) - (np.cumsum(of_node) - of_node)[node]
    wanted, all_ = missing[node], np.maximum(of_node, 1)[node]
    return upto * wanted // all_ - (upto - some) * wanted // all_


def _order_to_fill(size: Array, node: Array, bounds: Array) -> Array:
    """An order of runs in which many end exactly at a shard's boundary, so that few are cut.

    Greedy: of the next `_LOOKAHEAD` runs of the node it takes one that fills the shard exactly, or
    two that do so together; else the first that leaves room; else the first.

    Args:
        size: int64 (runs,), tokens.
        node: int64 (runs,), rising; runs keep to their node.
        bounds: int64 (ranks + 1,), where the ranks' room begins and ends, laid end to end.

    Returns:
        int64 (runs,), a permutation.
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
        ahead = due[begin : min(begin + _LOOKAHEAD, ends[begin])]
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
            # None ends at the boundary: prefer a run that ends before it to one that is cut there.
            chosen = (next((place for place, i in enumerate(ahead) if sizes[i] < room), 0),)
        for place in chosen:
            order.append(ahead[place])
            at += sizes[ahead[place]]
        kept = [i for place, i in enumerate(ahead) if place not in chosen]
        begin += len(chosen)
        due[begin : begin + len(kept)] = kept
    return np.array(order, dtype=np.int64)
