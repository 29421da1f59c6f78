"""The stream: where tokens lie in every layer but full attention.

Those layers ask for even shards and for little else: what a fragment needs from elsewhere is a
state, or a few tokens. So tokens stay on the unit, a node or a rank, on which full attention
wants them; only what a unit holds beyond its share crosses to others. A sequence on a ring over
nodes then lies on each of them in two runs, for zigzag gives each an early part of it and a late
one. The runs of a node are laid end to end and cut evenly over its ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.layout import Array, Layout, Topology

_AHEAD = 12  # runs among which one that ends at a shard's boundary is sought


class _Runs(NamedTuple):
    """Runs of tokens, each of one sequence and in one place; (runs,) each, none is empty.

    Attributes:
        sequence, start, end: int64, positions [start, end) of the sequence.
        holder: int64, the unit or the rank that holds it.
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


def shard_bounds(tokens: int, ranks: int) -> Array:
    """int64 (ranks + 1,): where the shards of a stream begin and end; sizes differ by ≤ 1."""
    return np.arange(ranks + 1) * tokens // ranks


def in_order(lengths: Array, ranks: int) -> Layout:
    """The stream of sequences end to end in their order: rank r holds the r-th of equal shards."""
    sequence = np.flatnonzero(lengths)
    zero = np.zeros_like(sequence)
    runs = _Runs(sequence, zero, lengths[sequence], zero, zero)
    return _dealt(runs, shard_bounds(int(lengths.sum()), ranks))


def near_home(home: Layout, topology: Topology, by_node: bool) -> Layout:
    """The stream of tokens that stay where they are at home, up to an even share.

    Args:
        home: holds every token once, with all its heads.
        by_node: tokens stay on their node, where few sequences are cut; else they stay on
            their rank: hardly any is moved, but rings leave many fragments.
    """
    total = int(home.tokens.sum())
    ranks = np.arange(topology.ranks)
    unit = ranks // topology.ranks_per_node if by_node else ranks
    # The shards that are a token larger go to the units that hold the most.
    mean = np.bincount(unit, home.tokens) / np.bincount(unit)
    share = np.full(topology.ranks, total // topology.ranks)
    share[np.argsort(-mean[unit], kind="stable")[: total % topology.ranks]] += 1

    held = _Runs(home.sequence, home.start, home.end, unit[home.rank], home.rank.astype(float))
    runs = _evened(held.joined(), np.bincount(unit, share).astype(np.int64), topology, by_node)
    bounds = np.append(0, np.cumsum(share))
    if by_node:
        first = np.searchsorted(unit, runs.holder)
        near = np.clip(runs.home, first - 0.5, first + topology.ranks_per_node - 0.5)
        runs = runs.at(np.lexsort((runs.size, near, runs.holder)))
        runs = runs.at(_spare(runs.size, runs.holder, bounds))
    else:
        runs = runs.at(np.argsort(runs.holder, kind="stable"))
    return _dealt(runs, bounds)


def _evened(runs: _Runs, share: Array, topology: Topology, by_node: bool) -> _Runs:
    """The same with tokens of the units that hold more than their share on those that hold less.

    The last ones of a unit go: of the sequences that it holds whole, the shortest, so that few
    are cut. They go to units of the same node first.
    """
    whole = np.bincount(runs.sequence)[runs.sequence] == 1
    runs = runs.at(np.lexsort((-runs.size, whole, runs.holder)))
    units = np.arange(len(share))
    held = np.bincount(runs.holder, runs.size, len(share)).astype(np.int64)
    surplus, missing = np.maximum(held - share, 0), np.maximum(share - held, 0)
    if not surplus.any():
        return runs
    node = units if by_node else units // topology.ranks_per_node
    inside = np.minimum(np.bincount(node, surplus), np.bincount(node, missing)).astype(np.int64)
    giver, given = _queue(surplus, node, inside)
    taker, taken = _queue(missing, node, inside)
    edges = np.union1d(np.cumsum(given) - given, np.cumsum(taken) - taken)
    giver = giver[np.searchsorted(np.cumsum(given), edges, side="right")]
    taker = taker[np.searchsorted(np.cumsum(taken), edges, side="right")]
    amount = np.diff(edges, append=surplus.sum())
    # Each gift as a run of the tokens of all units end to end.
    order = np.argsort(giver, kind="stable")
    giver, taker, amount = giver[order], taker[order], amount[order]
    before = np.cumsum(amount) - amount
    begin = (np.cumsum(held) - surplus)[giver] + before
    begin -= before[np.searchsorted(giver, giver)]
    pieces, at = runs.cut(np.concatenate([begin, begin + amount]))
    gift = np.searchsorted(begin, at, side="right") - 1
    gone = (gift >= 0) & (at < (begin + amount)[np.maximum(gift, 0)])
    pieces.holder[gone] = taker[gift[gone]]
    return pieces.joined()


def _queue(amount: Array, node: Array, inside: Array) -> tuple[Array, Array]:
    """Amounts by unit as a queue: node by node what stays inside, then all the rest."""
    total = np.bincount(node, amount).astype(np.int64)
    before = np.cumsum(amount) - amount
    before -= (np.cumsum(total) - total)[node]  # … on the same node
    near = np.clip(inside[node] - before, 0, amount)
    unit = np.arange(len(amount))
    units, amounts = np.concatenate([unit, unit]), np.concatenate([near, amount - near])
    kept = amounts > 0
    return units[kept], amounts[kept]


def _dealt(runs: _Runs, bounds: Array) -> Layout:
    """Runs end to end, cut at `bounds`: a shard a rank, fragments that began elsewhere first."""
    pieces, at = runs.cut(bounds)
    rank = np.searchsorted(bounds, at, side="right") - 1
    shards = pieces._replace(holder=rank).joined()
    order = np.argsort(shards.start == 0, kind="stable")
    sequence, start, end, rank, _ = shards.at(order)
    return Layout.stack(sequence, start, end, rank, len(bounds) - 1)


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
