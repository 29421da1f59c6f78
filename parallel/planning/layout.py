"""Where tokens lie: layouts, the moves between two of them, and the rings that share keys.

A layout is a table of spans. A span is a run of tokens of one sequence that lies unbroken in
one rank's buffer. Sequences are numbered by their place in the batch, positions count inside the
sequence, offsets inside the rank's buffer. numpy only: plans are made on the host, and nothing
here knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Topology:
    """How many ranks there are, and which share a node: rank r is on node r // ranks_per_node."""

    ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1:
            raise ValueError(
                f"{self.ranks} ranks with {self.ranks_per_node} a node: both must be at least 1"
            )

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    def node(self, rank: Array | int) -> Array | int:
        """The node of a rank, or of each rank of an array."""
        return rank // self.ranks_per_node


@dataclass(frozen=True)
class Layout:
    """A table of spans, by rank and then by offset; no span is empty.

    Attributes:
        sequence, start, end, rank, offset: int64 (spans,). Positions [start, end) of
            `sequence` lie at [offset, offset + end - start) of the buffer of `rank`.
        piece, slices: int64 (spans,). The rank has that one of so many slices of the tokens'
            heads (`parallel.planning.heads`); piece 0 of 1 is all of them.
        tokens: int64 (ranks,), how many tokens each rank holds, all heads of them or some.
    """

    sequence: Array
    start: Array
    end: Array
    rank: Array
    offset: Array
    piece: Array
    slices: Array
    tokens: Array

    @staticmethod
    def stack(
        sequence: Array,
        start: Array,
        end: Array,
        rank: Array,
        ranks: int,
        piece: Array | None = None,
        slices: Array | None = None,
    ) -> Layout:
        """The layout in which each rank's spans follow one another in the given order."""
        piece = np.zeros_like(rank) if piece is None else piece
        slices = np.ones_like(rank) if slices is None else slices
        kept = np.flatnonzero(end > start)
        kept = kept[np.argsort(rank[kept], kind="stable")]
        sequence, start, end, rank, piece, slices = (
            column[kept] for column in (sequence, start, end, rank, piece, slices)
        )
        size = end - start
        tokens = np.bincount(rank, size, ranks).astype(np.int64)
        offset = np.cumsum(size) - size - (np.cumsum(tokens) - tokens)[rank]
        return Layout(sequence, start, end, rank, offset, piece, slices, tokens)

    @cached_property
    def load(self) -> Array:
        """float64 (ranks,): tokens of each rank, one of h slices counted as 1/h of a token."""
        return np.bincount(self.rank, (self.end - self.start) / self.slices, len(self.tokens))

    @cached_property
    def bounds(self) -> Array:
        """int64 (ranks + 1,): the rows of rank r are [bounds[r], bounds[r + 1])."""
        return np.searchsorted(self.rank, np.arange(len(self.tokens) + 1))

    def rows(self, rank: int) -> slice:
        """The rows of the spans that `rank` holds."""
        return slice(int(self.bounds[rank]), int(self.bounds[rank + 1]))


@dataclass(frozen=True)
class Moves:
    """Runs of tokens that go from one layout's buffers to the other's.

    Sorted by (source, target, source_offset). Rows with source == target are copies inside
    a rank. Sender and receiver of a pair see its rows in the same order, so the rows of one
    peer are one message without any header.

    Attributes:
        source, source_offset, target, target_offset, tokens: int64 (moves,).
        piece, slices: int64 (moves,), which of the tokens' heads go: see `Layout`.
        ranks: how many ranks there are.
    """

    source: Array
    source_offset: Array
    target: Array
    target_offset: Array
    tokens: Array
    piece: Array
    slices: Array
    ranks: int

    def sent(self, rank: int) -> Array:
        """Rows that leave `rank` (copies included), by target."""
        first, end = np.searchsorted(self.source, [rank, rank + 1])
        return np.arange(first, end)

    def received(self, rank: int) -> Array:
        """Rows that come to `rank` (copies included), by source."""
        return np.flatnonzero(self.target == rank)


def moves(stream: Layout, attention: Layout, cu_seqlens: Array) -> Moves:
    """What must go where so that tokens laid out as `stream` come to lie as `attention`.

    Args:
        stream: holds every token once, with all its heads.
        attention: holds every slice of every token once.
        cu_seqlens: int64 (N + 1,), the batch's sequences in cumulative form.
    """
    held = cu_seqlens[stream.sequence] + stream.start
    by_place = np.argsort(held, kind="stable")
    held = held[by_place]
    first = cu_seqlens[attention.sequence] + attention.start
    end = first + attention.end - attention.start
    # Each span of `attention` is cut where spans of `stream` begin inside it.
    begin = np.searchsorted(held, first, side="right") - 1
    pieces = np.searchsorted(held, end, side="left") - begin
    span = np.repeat(np.arange(len(first)), pieces)
    a = np.arange(len(span)) - np.repeat(np.cumsum(pieces) - pieces - begin, pieces)
    start = np.maximum(first[span], held[a])
    stop = np.minimum(end[span], np.append(held, cu_seqlens[-1])[a + 1])
    source_offset = stream.offset[by_place[a]] + start - held[a]
    target_offset = attention.offset[span] + start - first[span]
    source, target = stream.rank[by_place[a]], attention.rank[span]
    order = np.lexsort((source_offset, target, source))
    return Moves(
        source[order],
        source_offset[order],
        target[order],
        target_offset[order],
        (stop - start)[order],
        attention.piece[span][order],
        attention.slices[span][order],
        len(stream.tokens),
    )


@dataclass(frozen=True)
class Round:
    """One step of a ring's exchange; each array is int64 (seats,), of seats.

    Attributes:
        block: whose keys and values each seat works on.
        source: the seat that hands them over (itself in round 0).
        ready: the round since which that seat has held them: the transfer may begin as
            soon as that round begins.
    """

    block: Array
    source: Array
    ready: int


@dataclass(frozen=True)
class Ring:
    """Ranks that share some sequences' attention: tokens over seats, heads inside a seat.

    A sequence is cut into 2G chunks for the G seats; seat i has chunk i, its *early* one, and
    chunk 2G − 1 − i, its *late* one, so that all have the same causal work (Zeppelin, arXiv
    2509.21841, section 3.1). In a buffer the ring's tokens are one block: the early chunks of
    all its sequences, then the late ones. Against the block of an earlier seat, all queries
    meet its early keys and none its late ones; against that of a later one, the late queries
    meet all its keys.

    On a seat sits one rank, or several that split its heads (USP, arXiv 2405.07719): then
    each has all of the seat's tokens, and the ring turns for each slice of heads by itself. A
    ring of one seat is Ulysses (arXiv 2309.14509).

    Attributes:
        ranks: int64 (nodes, seats a node, slices); seat x·(seats a node) + l is ranks[x, l].
            Slices may reach over nodes: then "a node" is as many as a seat needs.
        sequences: int64 (S,), by place in the batch.
        chunks: int64 (S, 2G + 1), where each sequence's chunks begin and end. Sizes differ
            by one at most; a sequence shorter than 2G has empty ones. Where there is one
            seat, all of a sequence is its early chunk.
        offset: int64 (G · slices,), where the ring's block begins in each member's buffer.
    """

    ranks: Array
    sequences: Array
    chunks: Array
    offset: Array

    @property
    def seats(self) -> int:
        """G."""
        return self.ranks.shape[0] * self.ranks.shape[1]

    @property
    def slices(self) -> int:
        return self.ranks.shape[2]

    @property
    def members(self) -> Array:
        """int64 (G · slices,): the ranks; member m is on seat m // slices, slice m % slices."""
        return self.ranks.reshape(-1)

    @cached_property
    def early(self) -> Array:
        """int64 (G, S): tokens of each seat's early chunks."""
        return np.diff(self.chunks, axis=1)[:, : self.seats].T

    @cached_property
    def late(self) -> Array:
        """int64 (G, S): tokens of each seat's late chunks."""
        return np.diff(self.chunks, axis=1)[:, : self.seats - 1 : -1].T

    @cached_property
    def tokens(self) -> Array:
        """int64 (G,): tokens of each seat's block."""
        return (self.early + self.late).sum(axis=1)

    def rounds(self) -> list[Round]:
        """The exchange: every seat meets every block once, its own first.

        Two rings in one. On the outer one, each seat passes its block to its peer on the
        next node, so that traffic between nodes is spread over the node's ranks and NICs
        and enters each node once; on the inner one, blocks go round inside the node.
        """
        nodes, each, _ = self.ranks.shape
        node, local = np.divmod(np.arange(nodes * each), each)
        rounds: list[Round] = []
        for outer in range(nodes):
            for inner in range(each):
                block = (node - outer) % nodes * each + (local - inner) % each
                if inner:
                    source, ready = node * each + (local - 1) % each, len(rounds) - 1
                elif outer:
                    source, ready = (node - 1) % nodes * each + local, len(rounds) - each
                else:
                    source, ready = np.arange(nodes * each), 0
                rounds.append(Round(block, source, ready))
        return rounds


@dataclass(frozen=True)
class Plan:
    """Where every token of one batch lies in every kind of layer.

    Attributes:
        topology: the ranks.
        strategy: what made it: "balanced", "ring", "even" or "allgather".
        cu_seqlens: int64 (N + 1,), the batch's lengths in cumulative form (empty sequences
            allowed).
        stream: what all layers but full attention work on: shards whose sizes differ by one
            token at most, or as far as memory allows where that makes all work even. On each
            rank fragments that go on from elsewhere come first.
        attention: what full attention works on; on each rank the blocks of `rings` in
            their order, then the sequences that it holds whole, in the batch's order.
        rings: those between nodes first, then by falling size; every rank works through
            its own in this order, so no two ranks wait for each other in a circle.
        to_attention: the moves from the stream's layout to that of attention; read backwards,
            the way of o to the stream.
        waves: into how many runs of heads attention is cut, one after the other, so that one
            run's tokens move while another's attention is computed.
    """

    topology: Topology
    strategy: str
    cu_seqlens: Array
    stream: Layout
    attention: Layout
    rings: tuple[Ring, ...]
    to_attention: Moves
    waves: int = 1

    @cached_property
    def fragments(self) -> list[Array]:
        """Of each sequence that is not empty, its rows of `stream`, in order of positions."""
        order = np.lexsort((self.stream.start, self.stream.sequence))
        sequence = self.stream.sequence[order]
        return np.split(order, np.flatnonzero(np.diff(sequence)) + 1) if len(order) else []

    @cached_property
    def crossing(self) -> list[Array]:
        """`fragments` of the sequences that lie in several."""
        return [rows for rows in self.fragments if len(rows) > 1]

    @property
    def sliced(self) -> bool:
        """Whether any rank holds some heads only."""
        return any(ring.slices > 1 for ring in self.rings)

    def rings_of(self, rank: int) -> list[tuple[Ring, int]]:
        """The rings that `rank` is in, with its member number, in the order of work."""
        found = [(ring, np.flatnonzero(ring.members == rank)) for ring in self.rings]
        return [(ring, int(member[0])) for ring, member in found if len(member)]

    def whole(self, rank: int) -> slice:
        """Rows of `attention` with the sequences that `rank` holds whole."""
        rows = self.attention.rows(rank)
        blocks = sum(int(ring.tokens[m // ring.slices]) for ring, m in self.rings_of(rank))
        here = self.attention.offset[rows]
        return slice(rows.start + int(np.searchsorted(here, blocks)), rows.stop)
