"""The stream's order, and the seats in a ring: both chosen so that few tokens must move."""

from __future__ import annotations

import numpy as np

from parallel.layout import Array, Layout, Topology
from parallel.placing import Owners

_AHEAD = 12  # sequences among which one that ends at a shard's boundary is sought


def arrange(lengths: Array, owners: Owners, topology: Topology) -> Array:
    """The order in which a batch's sequences make up the stream: int64 (N,).

    They lie near the ranks that attend to them: by the middle of their owner set, node by
    node. Then a walk along the stream looks, at each boundary of shards, for a sequence (or
    two) that ends right there among those due next, and takes it first: no sequence is cut
    where another order of its neighbours would have spared it.
    """
    middle = np.array([grid.mean() for grid in owners.grids] or [0.0]) + 0.5
    own = owners.owner
    at = np.where(own >= 0, own + 0.5, middle[np.maximum(-1 - own, 0)])
    order = np.lexsort((lengths, own, at))
    return order[_spare(lengths[order], at[order] // topology.ranks_per_node, topology.ranks)]


def _spare(lengths: Array, node: Array, ranks: int) -> Array:
    """Places in a new order in which sequences end at the shards' boundaries where they can.

    `node` rises; sequences change places only among those of one node.
    """
    total = int(lengths.sum())
    due = list(range(len(lengths)))
    size = lengths.tolist()
    ends = np.searchsorted(node, node, side="right").tolist()
    order: list[int] = []
    at, begin = 0, 0
    boundary = iter((np.arange(1, ranks) * total // ranks).tolist())
    gap = next(boundary, total)
    while begin < len(due):
        while at >= gap and gap < total:
            gap = next(boundary, total)
        last = min(begin + _AHEAD, ends[begin])
        ahead = due[begin:last]
        room = gap - at
        first: dict[int, int] = {}
        chosen: tuple[int, ...] = (0,)
        if size[ahead[0]] > 0:
            for place, i in enumerate(ahead):
                if size[i] == room:
                    chosen = (place,)
                    break
                if (mate := first.get(room - size[i])) is not None:
                    chosen = (mate, place)
                    break
                first.setdefault(size[i], place)
            else:
                # Nothing ends here; a sequence that stays within the shard goes before one
                # that would be cut.
                fitting = [place for place, i in enumerate(ahead) if size[i] < room]
                chosen = (fitting[0],) if fitting else (0,)
        for place in chosen:
            order.append(ahead[place])
            at += size[ahead[place]]
        kept = [i for place, i in enumerate(ahead) if place not in chosen]
        begin += len(chosen)
        due[begin : begin + len(kept)] = kept
    return np.array(order, dtype=np.int64)


def seat(owners: Owners, cu_seqlens: Array, stream: Layout) -> Owners:
    """The same rings with ranks in the seats that keep the most tokens where they lie.

    Which ranks sit on which seat of a ring is free. Seat c gets chunks c and 2G − 1 − c of
    every sequence; runs of as many ranks as sit on a seat choose greedily by the tokens of
    those that they hold already. The seats of a row stay with the ranks of one node.
    """
    grids = list(owners.grids)
    bounds = np.concatenate([[0], np.cumsum(stream.tokens)])
    for g in np.unique(-1 - owners.owner[owners.owner < 0]):
        nodes, each, slices = grids[g].shape
        if nodes * each == 1:
            continue
        sequences = np.flatnonzero(owners.owner == -1 - g)
        runs = np.sort(grids[g], axis=None).reshape(-1, slices)
        order = _choose(cu_seqlens, sequences, bounds, runs, (nodes, each))
        grids[g] = runs[order].reshape(nodes, each, slices)
    return Owners(owners.owner, grids)


def _choose(
    cu_seqlens: Array, sequences: Array, bounds: Array, runs: Array, shape: tuple[int, int]
) -> Array:
    """For each seat the number of its run of ranks: the largest overlap first, then the rest."""
    (rows, each), size = shape, len(runs)
    begin, end = cu_seqlens[sequences, None], cu_seqlens[sequences + 1, None]
    chunks = (begin + np.arange(2 * size) * (end - begin) // (2 * size)).reshape(-1)
    # Pieces of the stream that lie in one chunk and on one run of ranks.
    first, last = bounds[runs[0, 0]], bounds[runs[-1, -1] + 1]
    cuts = bounds[runs[:, 0]]
    pieces = np.unique(np.concatenate([chunks, cuts, [first, last], end.reshape(-1)]))
    tokens = np.diff(pieces)
    pieces = pieces[:-1]
    chunk = np.searchsorted(chunks, pieces, side="right") - 1
    run = np.searchsorted(cuts, pieces, side="right") - 1
    here = (chunk >= 0) & (run >= 0) & (pieces < last)
    here &= pieces < end.reshape(-1)[np.maximum(chunk, 0) // (2 * size)]
    at = chunk[here] % (2 * size)
    pair = run[here] * size + np.minimum(at, 2 * size - 1 - at)
    pairs, which = np.unique(pair, return_inverse=True)
    overlap = np.bincount(which, tokens[here])
    seats = np.full(size, -1)
    free = np.ones(size, bool)
    row_of, node_of = np.full(rows, -1), np.full(rows, -1)
    for flat in pairs[np.argsort(-overlap, kind="stable")].tolist():
        run_at, seat_at = divmod(flat, size)
        node, row = run_at // each, seat_at // each
        if row_of[node] < 0 and node_of[row] < 0:
            row_of[node], node_of[row] = row, node
        if seats[seat_at] < 0 and free[run_at] and row_of[node] == row:
            seats[seat_at], free[run_at] = run_at, False
    node_of[node_of < 0] = np.flatnonzero(row_of < 0)
    by_row, free_of = seats.reshape(rows, each), free.reshape(rows, each)
    for row, node in enumerate(node_of):
        by_row[row, by_row[row] < 0] = node * each + np.flatnonzero(free_of[node])
    return seats


def resident(home: Layout, topology: Topology) -> Layout:
    """Even shards that leave tokens where attention wants them, but for each rank's surplus.

    The last tokens of a rank's buffer go where tokens are missing: first on its own node,
    then on others.
    """
    ranks = topology.ranks
    total = int(home.tokens.sum())
    share = np.diff(np.arange(ranks + 1) * total // ranks)
    # The larger shares go to the ranks that hold the most, so that fewer tokens move.
    even = np.empty_like(share)
    even[np.argsort(-home.tokens, kind="stable")] = -np.sort(-share)
    surplus = np.maximum(home.tokens - even, 0)
    missing = np.maximum(even - home.tokens, 0)
    if not surplus.any():
        return home
    node = np.arange(ranks) // topology.ranks_per_node
    inside = np.minimum(np.bincount(node, surplus), np.bincount(node, missing)).astype(np.int64)
    giver, given = _queue(surplus, node, inside)
    taker, taken = _queue(missing, node, inside)
    edges = np.unique(np.concatenate([[0], np.cumsum(given), np.cumsum(taken)]))
    amount = np.diff(edges)
    source = giver[np.searchsorted(np.cumsum(given), edges[:-1], side="right")]
    target = taker[np.searchsorted(np.cumsum(taken), edges[:-1], side="right")]
    # In the buffer of each giver: where what stays ends, and where each gift begins.
    by_source = np.argsort(source, kind="stable")
    source, target, amount = source[by_source], target[by_source], amount[by_source]
    before = np.cumsum(amount) - amount
    first_of = np.searchsorted(source, source)
    gift = np.minimum(home.tokens, even)[source] + before - before[first_of]
    begin = np.concatenate([np.cumsum(home.tokens) - home.tokens, [total]])
    cuts = begin[source] + gift
    spans = begin[home.rank] + home.offset
    edges = np.unique(np.concatenate([spans, cuts, [total]]))
    row = np.searchsorted(spans, edges[:-1], side="right") - 1
    start = home.start[row] + edges[:-1] - spans[row]
    holder = home.rank[row].copy()
    given_to = np.searchsorted(cuts, edges[:-1], side="right") - 1
    gone = (given_to >= 0) & (edges[:-1] < (cuts + amount)[np.maximum(given_to, 0)])
    holder[gone] = target[given_to[gone]]
    return Layout.stack(home.sequence[row], start, start + np.diff(edges), holder, ranks)


def _queue(amount: Array, node: Array, inside: Array) -> tuple[Array, Array]:
    """Amounts by rank as a queue: node by node what stays inside, then all the rest."""
    total = np.bincount(node, amount).astype(np.int64)
    before = np.cumsum(amount) - amount
    before -= (np.cumsum(total) - total)[node]  # … on the same node
    near = np.clip(inside[node] - before, 0, amount)
    rank = np.arange(len(amount))
    ranks, amounts = np.concatenate([rank, rank]), np.concatenate([near, amount - near])
    kept = amounts > 0
    return ranks[kept], amounts[kept]
