"""The balanced placing: which ranks attend to which sequence.

Bin packing with two resources, time and tokens. Sequences are placed longest first
(longest-processing-time scheduling, Graham 1969), in two stages: over the nodes, then over the
ranks of each node. In both:

- A sequence takes the fewest ranks that have time for it, up to the even share or a little more
  (`Limits.level`), and room for its tokens. Its time is that of attention or of passing keys round
  the ring, whichever is longer. So short sequences stay whole, middle ones go on a ring inside a
  node, long ones on a ring over adjacent nodes.
- Rings inside a node are the node's ranks, halves of them, halves of these: nested, so that
  rings seldom wait for each other, and sequences of one group share one exchange.
- A ring divides heads into the number of slices with which it is quickest (`Costs.ring_seconds`).
  With many key heads it is quicker to exchange heads once inside a node, over fast links, than to
  pass all keys round the ring.
- Of several candidates the one that *needs* most is taken: seconds missing to the even share, less
  what its free room will bring (free tokens times the seconds a token of the sequences that are
  still to be placed).

With even shards a node has two even shares, one of attention and one of tokens; tokens beyond its
share cross to other nodes. With `Limits.uneven` time is that of all work, and room is memory: a
node with more of attention's work takes fewer tokens, and all of them stay.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallel.planning.layout import Array
from parallel.planning.owners import Owners, rank_capacity, sliced
from parallel.planning.prices import Prices

# Sequences a node (or a rank, inside a node) that are placed one by one. The shorter rest is dealt
# out in proportion to free room, which for thousands of sequences is quicker.
_ONE_BY_ONE = 24
# Weight of missing time over missing room: of equal sequences, the least busy node or rank gets the
# next one.
_TIME_WEIGHT = 1.05


class Limits(NamedTuple):
    """Bounds within which `balanced` places.

    Attributes:
        level: seconds of a node, as a multiple of the mean, beyond which a sequence is spread over
            several nodes.
        tokens: tokens of a node, as a multiple of the mean. A node's surplus crosses between nodes
            in every layer of full attention.
        slices: how many slices heads may be divided into, as a share of their number. With one
            head a slice there can be only one wave.
        slack: fraction by which a rank's tokens may exceed the even share.
        rows: parts into which each node is cut. A ring over nodes takes whole parts: of two nodes
            in two parts each it may take three.
        uneven: even out the sum of all work over the nodes, and let shards differ; else even out
            attention and tokens, each for itself.
    """

    level: float
    tokens: float
    slices: float = 1.0
    slack: float = 0.15
    rows: int = 1
    uneven: bool = False


def balanced(prices: Prices, limits: Limits) -> Owners:
    """Place every sequence; see the head of this file.

    A placing may exceed its limits, where nothing else was found: `plan` checks it.
    """
    lengths, topology = prices.lengths, prices.topology
    rank_room = rank_capacity(lengths, topology, limits.slack)
    placing = _Placing(prices, rank_room, limits.uneven)
    share = float(lengths.sum()) / topology.ranks
    node_room = min(rank_room, limits.tokens * share)
    by_length = np.argsort(-lengths, kind="stable")
    by_length = by_length[lengths[by_length] > 0]
    inside = placing.over_nodes(by_length, limits.level, node_room)
    # Several limits often end in the same nodes; inside them they are then placed alike.
    key = placing.key(inside)
    if key not in prices.placed:
        for each in sorted(set(topology.sizes)):
            placing.inside_nodes(inside, np.flatnonzero(placing.sizes == each), each)
        prices.placed[key] = placing.owner, placing.grids
    return Owners(*prices.placed[key], "node" if limits.uneven else "even")


class _Placing:
    """The state of a placing: seconds and tokens of every rank so far, owners and rings.

    `rest` is the seconds a token of all other work if shards may be uneven, else 0. It counts when
    sequences are placed over nodes, not inside them.
    """

    def __init__(self, prices: Prices, room: float, uneven: bool) -> None:
        self.prices, self.room = prices, room
        self.lengths, self.topology, self.alone = prices.lengths, prices.topology, prices.alone
        self.level = prices.level
        topology = prices.topology
        self.rest = prices.costs.rest_both_ways if uneven else 0.0
        self.work = self.alone + self.rest * self.lengths
        self.slow = topology.seconds
        self.mean = float(self.work.sum() / (1 / self.slow).sum())
        self.seconds = np.zeros(topology.ranks)
        self.tokens = np.zeros(topology.ranks)
        self.owner = np.zeros(len(self.lengths), np.int64)
        self.grids: list[Array] = []
        self.rings: dict[tuple[bytes, int], int] = {}
        self.sizes = np.array(topology.sizes)
        # (nodes,): what a node computes against a rank of full speed, and its slowest rank's time.
        self.power = np.add.reduceat(1 / self.slow, topology.first)
        self.slowest = np.maximum.reduceat(self.slow, topology.first)

    def ring(self, ranks: Array, slices: int) -> int:
        """The ring over `ranks` (rows, each), made unless it exists: its value in `owner`."""
        key = ranks.tobytes(), slices
        if key not in self.rings:
            self.rings[key] = len(self.grids)
            self.grids.append(sliced(ranks, slices))
        return -1 - self.rings[key]

    def key(self, node: Array) -> tuple[bytes, ...]:
        """Equal for placings over nodes that go on alike inside the nodes.

        Args:
            node: int64 (N,), of `over_nodes`.
        """
        groups = [_groups(each, 1).sum(axis=1) for each in set(self.topology.sizes)]
        widths = np.unique(np.concatenate(groups)).tolist()
        slices = (self.prices.on_ranks(1, width)[1] for width in widths)
        state = node, self.owner, self.seconds, self.tokens, *self.grids, *slices
        other = repr((self.room, [x.shape for x in self.grids])).encode()
        return other, *(x.tobytes() for x in state)

    def over_nodes(self, by_length: Array, level: float, node_room: float) -> Array:
        """Place sequences over nodes: on rings over several, if no node has time and room.

        Returns:
            int64 (N,): the node of each sequence, −1 if it is on a ring over nodes or empty.
        """
        node = np.full(len(self.lengths), -1)
        # (nodes,): seconds and tokens of one rank of each node.
        load, held = np.zeros(self.topology.nodes), np.zeros(self.topology.nodes)
        limit = level * self.mean
        # With even shards all room is taken in the end; with uneven ones it is not scarce.
        worth = self._worth(by_length) * (not self.rest)
        share = self.lengths.sum() / self.topology.ranks
        singly = min(len(by_length), max(256, _ONE_BY_ONE * self.topology.nodes))
        # (singly, nodes): of each sequence on each node.
        of_seconds = self.work[by_length[:singly], None] / self.power
        of_tokens = self.lengths[by_length[:singly], None] / self.sizes
        for at, i in enumerate(by_length[:singly].tolist()):
            n, seconds, tokens = float(self.lengths[i]), of_seconds[at], of_tokens[at]
            need = _TIME_WEIGHT * (self.mean - load) - (node_room - held) * worth[at]
            fits = held + tokens <= node_room
            good = fits & (load + seconds <= limit)
            first, spread = int(np.where(good, need, -np.inf).argmax()), 1
            if not good[first] and n > share:
                first, spread = self._window(i, load, held, limit, node_room)
            elif not good[first]:  # no longer than an even shard: never shared
                first = int(np.where(fits, need, -np.inf).argmax() if fits.any() else held.argmin())
            if spread == 1:
                node[i] = first
                load[first] += seconds[first]
                held[first] += tokens[first]
                continue
            ranks = self._rows(first, spread)
            nodes = slice(first, first + spread)
            each, slices = (x[i] for x in self.prices.on_ranks(*ranks.shape))
            each *= self.slowest[nodes].max()
            self.owner[i] = self.ring(ranks, int(slices))
            self.seconds[ranks] += each
            self.tokens[ranks] += n / ranks.size
            load[nodes] += each + self.rest * n / ranks.size * self.slowest[nodes]
            held[nodes] += n / ranks.size
        rest = by_length[singly:]
        free = (self.mean - load) * self.power if self.rest else (node_room - held) * self.sizes
        node[rest] = _deal(np.maximum(free, 0.0), len(rest))
        return node

    def _window(
        self, i: int, load: Array, held: Array, limit: float, node_room: float
    ) -> tuple[int, int]:
        """The fewest adjacent nodes with time and room for sequence i: the first one, their number.

        Best fit: of several such windows the busiest. If there is none, the window that finishes
        earliest. Windows with nodes that miss ranks are priced by themselves.

        Args:
            load, held: (nodes,), seconds and tokens of one rank of each node.
        """
        each, nodes = self.topology.ranks_per_node, self.topology.nodes
        n = float(self.lengths[i])
        least = min(nodes, max(1, int(np.ceil(n / (each * self.room)))))
        seconds = self.prices.over_nodes(i)[0] + self.rest * n / (each * np.arange(1, nodes + 1))
        alone = 1 + int((seconds <= limit).argmax())
        best, earliest = (0, nodes), np.inf
        of_node = np.stack([load, held, self.slowest, each - self.sizes])
        most = of_node  # (4, windows): of each `spread` adjacent nodes the highest
        # At most about twice the nodes that would do if they were idle.
        for spread in range(1, min(nodes, 2 * max(least, alone) + 2) + 1):
            if spread > 1:
                most = np.maximum(most[:, :-1], of_node[:, spread - 1 :])
            if spread < least:
                continue
            busiest, fullest, slowest, lacking = most
            late = busiest + seconds[spread - 1] * slowest
            full = fullest + n / (spread * each)
            for first in np.flatnonzero(lacking).tolist():
                rows, width = self._rows(first, spread).shape
                mine = self.prices.on_ranks(rows, width)[0][i] + self.rest * n / (rows * width)
                late[first] += mine - seconds[spread - 1]
                full[first] += n / (rows * width) - n / (spread * each)
            good = (late <= limit) & (full <= node_room)
            if good.any():
                return int(np.where(good, late, -np.inf).argmax()), spread
            # Windows over the memory's limit come after all others, the least full of them first.
            late = np.where(full <= self.room, late, 1e9 * self.mean * full)
            if late.min() < earliest:
                best, earliest = (int(late.argmin()), spread), late.min()
        return best

    def _rows(self, first: int, spread: int) -> Array:
        """The ranks of a ring over `spread` nodes from `first`: int64 (rows, each).

        A row has as many ranks as the smallest of the nodes; a larger node has as many rows as fit.
        """
        nodes = range(first, first + spread)
        width = int(self.sizes[first : first + spread].min())
        starts = [
            int(self.topology.first[node]) + row * width
            for node in nodes
            for row in range(self.sizes[node] // width)
        ]
        return np.array(starts)[:, None] + np.arange(width)

    def _worth(self, by_length: Array) -> Array:
        """(sequences,): seconds a token, averaged over each sequence and all shorter ones."""
        seconds = np.cumsum(self.work[by_length][::-1])[::-1]
        return seconds / np.cumsum(self.lengths[by_length][::-1])[::-1]

    def inside_nodes(self, node: Array, nodes: Array, each: int, least: int = 1) -> None:
        """Place the sequences of `nodes` over their ranks; step s places each node's s-th longest.

        If a rank ends up with too many tokens, whole sequences do not pack well enough: that node
        starts again with groups of at least 2 · `least` ranks. A group of all ranks always fits.

        Args:
            node: int64 (N,), the node of each sequence.
            nodes: (nodes,), those to place; each has `each` ranks.
        """
        first = self.topology.first[nodes]
        ranks = first[:, None] + np.arange(each)  # (nodes, each)
        mine = np.flatnonzero(np.isin(node, nodes))
        mine = mine[np.lexsort((-self.lengths[mine], node[mine]))]
        row = np.searchsorted(nodes, node[mine])
        counts = np.bincount(row, minlength=len(nodes))
        nth = np.arange(len(mine)) - (np.cumsum(counts) - counts)[row]
        steps = int(counts.max(initial=0))
        # (sequences,) -> (nodes, steps): a node's sequences, longest first, −1 past the last one.
        table = np.full((len(nodes), steps), -1)
        table[row, nth] = mine
        n = np.where(table >= 0, self.lengths[table], 0).astype(np.float64)
        alone = np.where(table >= 0, self.alone[table], 0.0)
        seconds, tokens = self.seconds[ranks], self.tokens[ranks]  # (nodes, each) copies
        slow = self.slow[ranks]
        level = ((seconds / slow).sum(axis=1) + alone.sum(axis=1)) / self.power[nodes]
        level = np.maximum(self.level, level)[:, None]
        after_seconds = np.cumsum(alone[:, ::-1], axis=1)[:, ::-1]
        after_tokens = np.cumsum(n[:, ::-1], axis=1)[:, ::-1]
        worth = after_seconds / np.maximum(after_tokens, 1)
        groups = _groups(each, least)  # (groups, each)
        size = groups.sum(axis=1)
        singly = min(steps, max(_ONE_BY_ONE * each, 64))
        # (nodes, singly, groups): seconds that a sequence costs each rank of a group.
        by_size = {int(s): self.prices.on_ranks(1, int(s))[0] for s in np.unique(size)}
        costs = np.stack([by_size[int(s)][table[:, :singly]] for s in size], axis=2)
        # (nodes, groups): a group takes as long as its slowest rank.
        slowest = np.where(groups, slow[:, None, :], 0).max(axis=2)
        every = np.arange(len(nodes))
        chosen_at = np.zeros((singly, len(nodes)), np.int64)
        for step in range(singly):
            length, present = n[:, step, None], table[:, step] >= 0
            need = _TIME_WEIGHT * (level - seconds) - (self.room - tokens) * worth[:, step, None]
            late = seconds + alone[:, step, None] * slow
            good = (tokens + length <= self.room) & (late <= level)
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
                    costs[shared, step] * slowest[shared],
                )
            taken = groups[chosen] & present[:, None]
            each_takes = costs[every, step, chosen] * slowest[every, chosen]
            seconds += np.where(taken, each_takes[:, None], 0.0)
            tokens += np.where(taken, length / size[chosen, None], 0.0)
            chosen_at[step] = chosen
        self._record(table[:, :singly].T, chosen_at, groups, first)
        tail = table[:, singly:]
        for at in every[(tail >= 0).any(axis=1)]:
            rest = tail[at][tail[at] >= 0]
            bins = _deal(np.maximum(self.room - tokens[at], 0.0), len(rest))
            self.owner[rest] = first[at] + bins
            seconds[at] += np.bincount(bins, self.alone[rest], each) * slow[at]
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
        """The group for one sequence of each node: the smallest that fits, then the neediest.

        Args:
            length, limit: (nodes, 1), the sequence's tokens, and seconds a rank may come to.
            seconds, tokens, need: (nodes, ranks).
            groups: bool (groups, ranks).
            costs: (nodes, groups), seconds of the sequence on each rank of a group.

        Returns:
            int64 (nodes,), numbers of groups.
        """
        size = groups.sum(axis=1)
        # (nodes, 1, ranks) over (groups, ranks) -> (nodes, groups): what each group's busiest, and
        # its fullest, rank would come to.
        late = np.where(groups, seconds[:, None, :], 0).max(axis=2)
        late = late + costs
        full = np.where(groups, tokens[:, None, :], 0).max(axis=2) + length / size
        fits = full <= self.room
        good = fits & (late <= limit)
        fewest = np.where(good, size, size.max() + 1).min(axis=1, keepdims=True)
        # Not a matrix product: BLAS sums in an order that depends on the CPU, and every rank must
        # come to the same plan.
        missing = np.where(groups, need[:, None, :], 0).sum(axis=2) / size
        score = np.where(good & (size == fewest), missing, -np.inf)
        # If no group is within the limit, the one done earliest; if none has room, the least full.
        poor = np.where(fits, -late, -1e9 * (1 + full))
        return np.where(good.any(axis=1, keepdims=True), score, poor).argmax(axis=1)

    def _record(self, sequence: Array, chosen: Array, groups: Array, first: Array) -> None:
        """Enter in `owner` that each step's sequence of each node went to a group.

        Args:
            sequence: int64 (steps, nodes), by place in the batch; −1: none.
            chosen: int64 (steps, nodes), numbers of groups.
            groups: bool (groups, ranks).
            first: (nodes,), ranks.
        """
        begin, size = first + groups.argmax(axis=1)[chosen], groups.sum(axis=1)[chosen]
        whole = (size == 1) & (sequence >= 0)
        self.owner[sequence[whole]] = begin[whole]
        rings = (size > 1) & (sequence >= 0)
        for i, a, count in zip(*(x[rings].tolist() for x in (sequence, begin, size)), strict=True):
            ranks = np.arange(a, a + count)[None]
            self.owner[i] = self.ring(ranks, int(self.prices.on_ranks(1, count)[1][i]))


def _groups(each: int, least: int) -> Array:
    """bool (groups, each): single ranks; all ranks, their halves, the halves' halves, ….

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


def _deal(room: Array, pieces: int) -> Array:
    """int64 (pieces,): bins for pieces of falling length.

    Each bin takes a number of pieces in proportion to its room, evenly spaced in the order, so
    that every bin has long and short ones.
    """
    if not room.sum():
        room = np.ones(len(room))
    shares = np.cumsum(room) / room.sum() * pieces
    counts = np.diff(np.floor(shares + 0.5).astype(np.int64), prepend=0)
    bins = np.repeat(np.arange(len(room)), counts)
    nth = np.arange(pieces) - np.repeat(np.cumsum(counts) - counts, counts)
    # Multiples of the golden ratio, modulo 1, spread the bins' first pieces over one spacing.
    phase = (bins * 0.6180339887498949) % 1.0
    return bins[np.argsort((nth + phase) / counts[bins], kind="stable")]
