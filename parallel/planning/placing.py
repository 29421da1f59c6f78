"""The balanced placing: which ranks attend to which sequence.

Sequences are placed longest first, in two stages: over the nodes, then over the ranks of
each node. At both, three rules decide:

- A sequence takes as few ranks as have time left for it, up to the even share or a little
  more (`Limits`), and room for its tokens; time is that of attention or of the keys' way round
  the ring, whichever is longer. So short ones stay whole, middle ones go on a ring inside a
  node, long ones on a ring over adjacent nodes.
- Rings inside a node are the node's ranks, their halves, the halves' halves: nested, so
  that rings seldom wait for each other and sequences of one group share one exchange.
- A ring splits heads into as many slices as make it quickest (`Costs.shared`): keys of many
  heads are faster told apart inside a node, where links are fast, than sent all the way round.
- Among equals it goes where time is missing most, counted after the share that the free
  room will bring by itself (R tokens of room will hold sequences of the kind still in
  hand). That is longest-processing-time scheduling (Graham, 1969) with two resources.

With even shards a node has two even shares, of attention and of tokens, and what it holds too
much of tokens crosses to others. Otherwise (`Limits.uneven`) time is that of all work, and room
that of memory: a node with more of attention's work has fewer tokens, and all of them stay.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.planning.layout import Array
from parallel.planning.owners import Owners, room
from parallel.planning.prices import Prices

_SINGLY = 24  # sequences a node that are placed one by one; the shorter rest is dealt in sweeps

_LEVEL = 1.05  # time weighs a little more than room: of equal sequences, the idlest gets the next


class Limits(NamedTuple):
    """How far a placing may go.

    Attributes:
        level: seconds that a node may come to before sequences are spread over several, as a
            multiple of the mean.
        tokens: of a node, likewise. What it holds too much crosses between nodes in every layer.
        slices: into how many parts heads may be split, as a share of their number. One head a
            rank leaves nothing to come in waves.
        slack: how far a rank's tokens may exceed the even share, as a fraction.
        rows: of ranks that a node is taken apart into. A ring over nodes is one of whole rows:
            of two on each node it may have three.
        uneven: all work is made even over the nodes, that of tokens too, and not either for
            itself: who has more of attention's has fewer tokens.
    """

    level: float
    tokens: float
    slices: float = 1.0
    slack: float = 0.15
    rows: int = 1
    uneven: bool = False


def balanced(prices: Prices, limits: Limits) -> Owners:
    """Place every sequence; see the head of this file. That limits are kept is no promise."""
    lengths, topology = prices.lengths, prices.topology
    rank_room = room(lengths, topology, limits.slack)
    placing = _Placing(prices, rank_room, limits.uneven)
    share = float(lengths.sum()) / topology.ranks
    node_room = min(rank_room, limits.tokens * share)
    by_length = np.argsort(-lengths, kind="stable")
    by_length = by_length[lengths[by_length] > 0]
    inside = placing.over_nodes(by_length, limits.level, node_room)
    last = topology.nodes - 1
    small = topology.ranks % topology.ranks_per_node
    if topology.nodes - bool(small):
        full = np.arange(topology.nodes - bool(small))
        placing.inside_nodes(inside, full, topology.ranks_per_node)
    if small:
        placing.inside_nodes(inside, np.array([last]), small)
    return Owners(placing.owner, placing.grids, "node" if limits.uneven else "even")


class _Placing:
    """Loads while sequences are placed: seconds and tokens of every rank.

    Over the nodes also the rest of the work counts, if shards need not be even: `rest` seconds a
    token, else 0.
    """

    def __init__(self, prices: Prices, room: float, uneven: bool) -> None:
        self.prices, self.room = prices, room
        self.lengths, self.topology, self.alone = prices.lengths, prices.topology, prices.alone
        self.level = prices.level
        topology = prices.topology
        self.rest = prices.costs.rest_both_ways if uneven else 0.0
        self.work = self.alone + self.rest * self.lengths
        self.mean = float(self.work.sum()) / topology.ranks
        self.seconds = np.zeros(topology.ranks)
        self.tokens = np.zeros(topology.ranks)
        self.owner = np.zeros(len(self.lengths), np.int64)
        self.grids: list[Array] = []
        self.rings: dict[tuple[bytes, int], int] = {}
        self.sizes = np.diff(
            np.minimum(np.arange(topology.nodes + 1) * topology.ranks_per_node, topology.ranks)
        )

    def ring(self, ranks: Array, slices: int) -> int:
        """The number of the ring over rows of ranks, (rows, each), as `owner` has it."""
        key = ranks.tobytes(), slices
        if key not in self.rings:
            self.rings[key] = len(self.grids)
            self.grids.append(ranks.reshape(-1, max(1, ranks.shape[1] // slices), slices))
        return -1 - self.rings[key]

    def over_nodes(self, by_length: Array, level: float, node_room: float) -> Array:
        """Put those for which no node has time and room on rings over nodes; the node of each
        other one, −1 for those."""
        node = np.full(len(self.lengths), -1)
        # Seconds and tokens of each rank of a node.
        load, held = np.zeros(self.topology.nodes), np.zeros(self.topology.nodes)
        limit = level * self.mean
        # Room is all taken if shards are even. If not, there is enough of it.
        worth = self._worth(by_length) * (not self.rest)
        share = self.lengths.sum() / self.topology.ranks
        singly = min(len(by_length), max(256, _SINGLY * self.topology.nodes))
        for at in range(singly):
            i = int(by_length[at])
            n, work = float(self.lengths[i]), float(self.work[i])
            seconds, tokens = work / self.sizes, n / self.sizes
            need = _LEVEL * (self.mean - load) - (node_room - held) * worth[at]
            fits = held + tokens <= node_room
            good = fits & (load + seconds <= limit)
            spread = 1
            if good.any():
                first = int(np.where(good, need, -np.inf).argmax())
            elif n > share:
                first, spread = self._window(i, load, held, limit, node_room)
            else:  # too short to share
                first = int(np.where(fits, need, -np.inf).argmax() if fits.any() else held.argmin())
            if spread == 1:
                node[i] = first
                load[first] += seconds[first]
                held[first] += tokens[first]
                continue
            ranks = self._rows(first, spread)
            each, slices = (x[i] for x in self.prices.of(*ranks.shape))
            self.owner[i] = self.ring(ranks, int(slices))
            self.seconds[ranks] += each
            self.tokens[ranks] += n / ranks.size
            load[first : first + spread] += each + self.rest * n / ranks.size
            held[first : first + spread] += n / ranks.size
        rest = by_length[singly:]
        free = (self.mean - load if self.rest else node_room - held) * self.sizes
        node[rest] = _sweep(np.maximum(free, 0.0), len(rest))
        return node

    def _window(
        self, i: int, load: Array, held: Array, limit: float, node_room: float
    ) -> tuple[int, int]:
        """The fewest adjacent nodes that have time and room for sequence i: the first, and their
        number.

        The fullest of these windows. Where there is none, the one that is done first. Only the
        last node may be a smaller one, which makes its neighbours wait.
        """
        each, nodes = self.topology.ranks_per_node, self.topology.nodes
        n = float(self.lengths[i])
        least = min(nodes, max(1, int(np.ceil(n / (each * self.room)))))
        seconds = self.prices.over(i)[0] + self.rest * n / (each * np.arange(1, nodes + 1))
        alone = 1 + int((seconds <= limit).argmax())
        best, earliest = (0, nodes), np.inf
        # More than twice as many as it would need alone are not worth a ring.
        for spread in range(least, min(nodes, 2 * max(least, alone) + 2) + 1):
            late = _highest(load, spread) + seconds[spread - 1]
            full = _highest(held, spread) + n / (spread * each)
            if self.sizes[-1] < each:
                rows, width = self._rows(nodes - spread, spread).shape
                mine = self.prices.of(rows, width)[0][i] + self.rest * n / (rows * width)
                late[-1] += mine - seconds[spread - 1]
                full[-1] += n / (rows * width) - n / (spread * each)
            good = (late <= limit) & (full <= node_room)
            if good.any():
                return int(np.where(good, late, -np.inf).argmax()), spread
            # Where nothing fits, the least full.
            late = np.where(full <= self.room, late, 1e9 * self.mean * full)
            if late.min() < earliest:
                best, earliest = (int(late.argmin()), spread), late.min()
        return best

    def _rows(self, first: int, spread: int) -> Array:
        """The ranks of a ring over `spread` nodes, in rows as `Ring` has nodes: (rows, each).

        A row is as many ranks as the smallest node has; a larger one gives as many rows as it can.
        """
        nodes = range(first, first + spread)
        width = int(self.sizes[first : first + spread].min())
        starts = [
            node * self.topology.ranks_per_node + row * width
            for node in nodes
            for row in range(self.sizes[node] // width)
        ]
        return np.array(starts)[:, None] + np.arange(width)

    def _worth(self, by_length: Array) -> Array:
        """Seconds a token of the sequences from each one on, longest first."""
        seconds = np.cumsum(self.work[by_length][::-1])[::-1]
        return seconds / np.cumsum(self.lengths[by_length][::-1])[::-1]

    def inside_nodes(self, node: Array, nodes: Array, each: int, least: int = 1) -> None:
        """Place the sequences of `nodes`, which have `each` ranks, all nodes in step.

        Where ranks overflow, whole sequences do not fill them well: such nodes begin anew
        with groups of at least twice `least` ranks. The whole node always fits.
        """
        first = nodes * self.topology.ranks_per_node
        ranks = first[:, None] + np.arange(each)
        mine = np.flatnonzero(np.isin(node, nodes))
        mine = mine[np.lexsort((-self.lengths[mine], node[mine]))]
        row = np.searchsorted(nodes, node[mine])
        counts = np.bincount(row, minlength=len(nodes))
        nth = np.arange(len(mine)) - (np.cumsum(counts) - counts)[row]
        steps = int(counts.max(initial=0))
        table = np.full((len(nodes), steps), -1)
        table[row, nth] = mine
        n = np.where(table >= 0, self.lengths[table], 0).astype(np.float64)
        alone = np.where(table >= 0, self.alone[table], 0.0)
        seconds, tokens = self.seconds[ranks], self.tokens[ranks]  # copies
        level = np.maximum(self.level, seconds.mean(axis=1) + alone.sum(axis=1) / each)[:, None]
        after_seconds = np.cumsum(alone[:, ::-1], axis=1)[:, ::-1]
        after_tokens = np.cumsum(n[:, ::-1], axis=1)[:, ::-1]
        worth = after_seconds / np.maximum(after_tokens, 1)
        groups = _halves(each, least)
        size = groups.sum(axis=1)
        singly = min(steps, max(_SINGLY * each, 64))
        # (nodes, singly, groups): what a sequence costs each rank of a group.
        by_size = {int(s): self.prices.of(1, int(s))[0] for s in np.unique(size)}
        costs = np.stack([by_size[int(s)][table[:, :singly]] for s in size], axis=2)
        every = np.arange(len(nodes))
        for step in range(singly):
            length, present = n[:, step, None], table[:, step] >= 0
            need = _LEVEL * (level - seconds) - (self.room - tokens) * worth[:, step, None]
            good = (tokens + length <= self.room) & (seconds + alone[:, step, None] <= level)
            alone_fits = good.any(axis=1) & (least == 1)
            chosen = np.where(alone_fits, np.where(good, need, -np.inf).argmax(axis=1), 0)
            shared = np.flatnonzero(present & ~alone_fits)
            if len(shared):
                chosen[shared] = self._share(
                    length[shared],
                    seconds[shared],
                    tokens[shared],
                    need[shared],
                    level[shared],
                    groups,
                    costs[shared, step],
                )
            taken = groups[chosen] & present[:, None]
            seconds += np.where(taken, costs[every, step, chosen][:, None], 0.0)
            tokens += np.where(taken, length / size[chosen, None], 0.0)
            self._own(table[:, step], chosen, groups, first)
        tail = table[:, singly:]
        for at in every[(tail >= 0).any(axis=1)]:
            rest = tail[at][tail[at] >= 0]
            bins = _sweep(np.maximum(self.room - tokens[at], 0.0), len(rest))
            self.owner[rest] = first[at] + bins
            seconds[at] += np.bincount(bins, self.alone[rest], each)
            tokens[at] += np.bincount(bins, self.lengths[rest], each)
        over = (tokens > self.room).any(axis=1) & (least < each)
        self.seconds[ranks[~over]] = seconds[~over]
        self.tokens[ranks[~over]] = tokens[~over]
        if over.any():
            self.inside_nodes(node, nodes[over], each, min(2 * least, each))

    def _share(
        self,
        length: Array,
        seconds: Array,
        tokens: Array,
        need: Array,
        limit: Array,
        groups: Array,
        costs: Array,
    ) -> Array:
        """The group of ranks for one sequence of each node: fitting first, then few, then needy.

        `length` and `limit` are (nodes, 1); seconds, tokens and need (nodes, ranks), costs
        (nodes, groups).
        """
        size = groups.sum(axis=1)
        # (nodes, groups): what the fullest member of each group would come to.
        late = np.where(groups, seconds[:, None, :], 0).max(axis=2)
        late = late + costs
        full = np.where(groups, tokens[:, None, :], 0).max(axis=2) + length / size
        fits = full <= self.room
        good = fits & (late <= limit)
        fewest = np.where(good, size, size.max() + 1).min(axis=1, keepdims=True)
        # Not a product of matrices: BLAS sums in an order of the CPU's, and plans are all alike.
        missing = np.where(groups, need[:, None, :], 0).sum(axis=2) / size
        score = np.where(good & (size == fewest), missing, -np.inf)
        # Where nothing is within the limit, the least late; where nothing fits, the least full.
        poor = np.where(fits, -late, -1e9 * (1 + full))
        return np.where(good.any(axis=1, keepdims=True), score, poor).argmax(axis=1)

    def _own(self, sequence: Array, chosen: Array, groups: Array, first: Array) -> None:
        """Write down that each node's `sequence` went to its group `chosen`."""
        begin = groups.argmax(axis=1)
        size = groups.sum(axis=1)
        whole = (size[chosen] == 1) & (sequence >= 0)
        self.owner[sequence[whole]] = (first + begin[chosen])[whole]
        for at in np.flatnonzero((size[chosen] > 1) & (sequence >= 0)):
            i, a, count = sequence[at], int(first[at] + begin[chosen[at]]), int(size[chosen[at]])
            ranks = np.arange(a, a + count)[None]
            self.owner[i] = self.ring(ranks, int(self.prices.of(1, count)[1][i]))


def _halves(each: int, least: int) -> Array:
    """bool (groups, each): single ranks, then all of them, their halves, the halves' halves.

    Groups of fewer than `least` ranks are left out.
    """
    parts, found = [(0, each)], []
    while parts:
        a, b = parts.pop()
        if b - a > 1:
            found.append([a <= rank < b for rank in range(each)])
            middle = (a + b + 1) // 2
            parts += [(a, middle), (middle, b)]
    every = np.concatenate([np.eye(each, dtype=bool), np.array(found, bool).reshape(-1, each)])
    return every[every.sum(axis=1) >= least]


def _highest(values: Array, run: int) -> Array:
    """Of each run of so many values that are adjacent."""
    # Indices cost a fifth of numpy's sliding windows, whose checks take longer than the maxima.
    return values[np.arange(run) + np.arange(len(values) - run + 1)[:, None]].max(axis=1)


def _sweep(room: Array, pieces: int) -> Array:
    """Bins for `pieces` of falling length: each takes evenly spaced ones, as its room allows."""
    if not room.sum():
        room = np.ones(len(room))
    shares = np.cumsum(room) / room.sum() * pieces
    counts = np.diff(np.floor(shares + 0.5).astype(np.int64), prepend=0)
    bins = np.repeat(np.arange(len(room)), counts)
    nth = np.arange(pieces) - np.repeat(np.cumsum(counts) - counts, counts)
    # The golden ratio spreads the bins' first pieces over one spacing.
    phase = (bins * 0.6180339887498949) % 1.0
    return bins[np.argsort((nth + phase) / counts[bins], kind="stable")]
