"""The plan of a batch: from its lengths alone, where every token lies in every kind of layer.

    lengths ── placing ──▶ owners ── order ──▶ stream ── cut ──▶ shards
                              └──────────────▶ attention layout, rings, moves

A pure function of its arguments: every rank computes the same plan, once a batch, on the
CPU. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from parallel.layout import Array, Layout, Moves, Plan, Ring, Round, Topology, moves

__all__ = ["Layout", "Moves", "Plan", "Ring", "Round", "Strategy", "Topology", "plan"]

Strategy = Literal["balanced", "ring", "even", "allgather"]


@dataclass(frozen=True)
class Owners:
    """Who holds what in full attention.

    Attributes:
        owner: int64 (N,), by place in the batch: a rank that holds the sequence whole, or
            −1 − i for ring i.
        grids: the ranks of each ring, int64 (nodes, members a node).
    """

    owner: Array
    grids: list[Array]


def plan(
    lengths: Sequence[int] | Array,
    topology: Topology,
    strategy: Strategy = "balanced",
    slack: float = 0.15,
) -> Plan:
    """Plan one batch.

    Args:
        lengths: (N,) int, tokens of each sequence of the batch; zeros are allowed.
        topology: the ranks.
        strategy: "balanced" chooses owners by length and work; "ring" leaves the batch's
            order and puts each sequence on the ranks whose shards hold it; "even" puts each
            sequence on all ranks; "allgather" leaves tokens in the stream's layout (a rank
            fetches the keys that come before its own).
        slack: how far a rank's tokens in the attention layout may exceed the even share, as
            a fraction. A sequence is never refused: where whole sequences do not fit, they
            go on rings.

    Raises:
        ValueError: a negative length, or a strategy that is not known.
    """
    each = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(each) and each.min() < 0:
        raise ValueError(f"lengths has {each.min()} at {each.argmin()}; a length is 0 or more")
    match strategy:
        case "balanced":
            owners = _balanced(each, topology, slack)
            order = _order(owners)
        case "even":
            owners = Owners(np.full(len(each), -1), [_grid(np.arange(topology.ranks), topology)])
            order = np.arange(len(each))
        case "ring":
            owners = _where_they_lie(each, topology)
            order = np.arange(len(each))
        case "allgather":
            owners = Owners(np.zeros(len(each), np.int64), [])
            order = np.arange(len(each))
        case _:
            raise ValueError(f"strategy {strategy!r}; it must be balanced, ring, even or allgather")
    cu_seqlens = np.concatenate([[0], np.cumsum(each[order])])
    stream = cut(cu_seqlens, topology.ranks)
    rings: tuple[Ring, ...] = ()
    if strategy == "allgather":
        attention = stream
    else:
        attention, rings = _attend(each[order], owners, order, topology.ranks)
    return Plan(
        topology=topology,
        strategy=strategy,
        order=order,
        cu_seqlens=cu_seqlens,
        stream=stream,
        attention=attention,
        rings=rings,
        to_attention=moves(stream, attention, cu_seqlens),
        to_stream=moves(attention, stream, cu_seqlens),
    )


def shard_bounds(tokens: int, ranks: int) -> Array:
    """int64 (ranks + 1,): where the shards of a stream begin and end; sizes differ by ≤ 1."""
    return np.arange(ranks + 1) * tokens // ranks


def cut(cu_seqlens: Array, ranks: int) -> Layout:
    """The stream's layout: rank r holds the r-th of `ranks` equal contiguous shards."""
    bounds = shard_bounds(int(cu_seqlens[-1]), ranks)
    edges = np.union1d(bounds, cu_seqlens)
    first, end = edges[:-1], edges[1:]
    sequence = np.searchsorted(cu_seqlens, first, side="right") - 1
    rank = np.searchsorted(bounds, first, side="right") - 1
    return Layout.stack(
        sequence, first - cu_seqlens[sequence], end - cu_seqlens[sequence], rank, ranks
    )


def _attend(
    lengths: Array, owners: Owners, order: Array, ranks: int
) -> tuple[Layout, tuple[Ring, ...]]:
    """The attention layout of sequences in stream order, and its rings."""
    owner = owners.owner[order]
    used = [g for g in range(len(owners.grids)) if (lengths[owner == -1 - g] > 0).any()]
    used.sort(key=lambda g: (-len(owners.grids[g]), -owners.grids[g].size))
    held = np.zeros(ranks, np.int64)
    pieces = []
    rings = []
    for g in used:
        grid = owners.grids[g]
        members = grid.reshape(-1)
        size = 2 * len(members)
        sequences = np.flatnonzero((owner == -1 - g) & (lengths > 0))
        chunks = np.arange(size + 1) * lengths[sequences, None] // size
        ring = Ring(grid, sequences, chunks, held[members])
        held[members] += ring.tokens
        rings.append(ring)
        for half in (np.arange(len(members)), np.arange(size - 1, len(members) - 1, -1)):
            pieces.append(
                [
                    np.tile(sequences, len(members)),
                    chunks[:, half].T.reshape(-1),
                    chunks[:, half + 1].T.reshape(-1),
                    np.repeat(members, len(sequences)),
                ]
            )
    whole = np.flatnonzero(owner >= 0)
    pieces.append([whole, np.zeros_like(whole), lengths[whole], owner[whole]])
    sequence, start, end, rank = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return Layout.stack(sequence, start, end, rank, ranks), tuple(rings)


def _grid(ranks: Array, topology: Topology) -> Array:
    """Ranks of a ring as (nodes, members a node); one row where nodes give unequal numbers."""
    _, counts = np.unique(topology.node(ranks), return_counts=True)
    return ranks.reshape(len(counts), -1) if (counts == counts[0]).all() else ranks[None]


def _where_they_lie(lengths: Array, topology: Topology) -> Owners:
    """Each sequence on the ranks whose shards hold it, the batch in its own order."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    bounds = shard_bounds(int(cu_seqlens[-1]), topology.ranks)
    first = np.searchsorted(bounds, cu_seqlens[:-1], side="right") - 1
    last = np.searchsorted(bounds, cu_seqlens[1:], side="left") - 1
    first = first.clip(0, topology.ranks - 1)
    last = np.maximum(first, last)
    grids: dict[tuple[int, int], int] = {}
    owner = first.copy()
    for i in np.flatnonzero(last > first):
        ends = int(first[i]), int(last[i])
        owner[i] = -1 - grids.setdefault(ends, len(grids))
    return Owners(owner, [_grid(np.arange(a, b + 1), topology) for a, b in grids])


def _groups(topology: Topology) -> list[Array]:
    """Ranks of every group that may share a sequence: whole nodes, and their halves' halves."""
    found = []
    for node in range(topology.nodes):
        first = node * topology.ranks_per_node
        parts = [np.arange(first, min(first + topology.ranks_per_node, topology.ranks))]
        while parts:
            part = parts.pop()
            if len(part) > 1:
                found.append(part)
                parts += np.array_split(part, 2)
    return found


def _balanced(lengths: Array, topology: Topology, slack: float) -> Owners:
    """Longest first, each on the smallest group where it keeps within the even shares."""
    ranks = topology.ranks
    work = lengths.astype(np.float64) ** 2
    room = np.ceil((1 + slack) * lengths.sum() / ranks)
    level = work.sum() / ranks
    tokens, load = np.zeros(ranks), np.zeros(ranks)
    groups = [*sorted(_groups(topology), key=len), np.arange(ranks)]
    owner = np.zeros(len(lengths), np.int64)
    used: dict[int, int] = {}
    for i in np.argsort(-lengths, kind="stable"):
        n, w = float(lengths[i]), work[i]
        free = np.where(tokens + n <= room, load, np.inf)
        best = int(free.argmin())
        if free[best] + w <= 1.05 * level or (n < room / 8 and np.isfinite(free[best])):
            owner[i] = best
            tokens[best] += n
            load[best] += w
            continue
        chosen = 0
        for chosen, group in enumerate(groups):
            size = len(group)
            fits = (tokens[group] + n / size).max() <= room
            if fits and (load[group] + w / size).max() <= 1.05 * level:
                break
        owner[i] = -1 - used.setdefault(chosen, len(used))
        group = groups[chosen]
        size = len(group)
        tokens[group] += n / size
        load[group] += w / size
    return Owners(owner, [_grid(groups[g], topology) for g in used])


def _order(owners: Owners) -> Array:
    """The stream's order: sequences lie near the ranks that attend to them."""
    place = np.array([grid.mean() for grid in owners.grids] or [0.0])
    ring = np.maximum(-1 - owners.owner, 0)
    at = np.where(owners.owner >= 0, owners.owner, place[ring])
    return np.lexsort((owners.owner, at))
