"""Where tokens lie: layouts, the moves between two of them, and the rings that share keys.

A layout is a table of spans. A span is a run of consecutive tokens of one sequence, stored
consecutively in one rank's buffer:

    sequence, start, end     which tokens: positions [start, end) of a sequence of the batch
    rank, offset             where: at [offset, offset + end − start) of that rank's buffer

Sequences are numbered by their place in the batch; positions count from a sequence's first token,
offsets from a buffer's first row. numpy only: plans are made on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Topology:
    """Which ranks share a node, and how quick each rank is.

    Attributes:
        ranks: how many there are.
        ranks_per_node: of a full node.
        sizes: ranks of each node; a node's ranks are numbered one after the other. Unless given,
            full nodes, and a last one with what is left.
        speeds: of each rank, against a rank of full speed. Unless given, 1 each.
    """

    ranks: int
    ranks_per_node: int
    sizes: tuple[int, ...] = ()
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        ranks, each = self.ranks, self.ranks_per_node
        if ranks < 1 or each < 1:
            raise ValueError(f"{ranks} ranks with {each} a node: both must be at least 1")
        full, left = divmod(ranks, each)
        sizes = self.sizes or (each,) * full + (left,) * bool(left)
        if sum(sizes) != ranks or min(sizes) < 1 or max(sizes) > each:
            raise ValueError(
                f"nodes of {', '.join(map(str, sizes))} ranks; together they must have {ranks}, "
                f"and each 1 to {each}"
            )
        speeds = self.speeds or (1.0,) * ranks
        if len(speeds) != ranks or not 0 < min(speeds) <= max(speeds) < np.inf:
            raise ValueError(f"speeds of {len(speeds)} ranks; {ranks} must be given, above 0 each")
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "speeds", speeds)

    @property
    def nodes(self) -> int:
        return len(self.sizes)

    @cached_property
    def first(self) -> Array:
        """int64 (nodes,): each node's first rank."""
        return np.cumsum(self.sizes) - self.sizes

    def node(self, rank: Any) -> Any:
        """The node of a rank, int64, or of each rank of an array."""
        return self._nodes[rank]

    @cached_property
    def _nodes(self) -> Array:
        return np.repeat(np.arange(self.nodes), self.sizes)

    @cached_property
    def seconds(self) -> Array:
        """float64 (ranks,): what each rank takes for a second's work of a rank of full speed."""
        return 1 / np.array(self.speeds)


@dataclass(frozen=True)
class Layout:
    """A table of spans, sorted by rank and then by offset; no span is empty.

    Attributes:
        sequence, start, end, rank, offset: int64 (spans,). Positions [start, end) of
            `sequence` lie at [offset, offset + end - start) of the buffer of `rank`.
        piece, slices: int64 (spans,). The rank holds slice number `piece` of the `slices` slices
            into which the tokens' heads are divided (`parallel.planning.heads`); 0 of 1 is all
            heads.
        tokens: int64 (ranks,), how many tokens each rank holds, with all their heads or some.
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
        """The layout in which each rank's spans lie end to end, in the given order.

        Args:
            sequence, start, end, rank: int64 (spans,); empty spans are left out.
            piece, slices: int64 (spans,); all heads unless given.
        """
        piece = np.zeros_like(rank) if piece is None else piece
        slices = np.ones_like(rank) if slices is None else slices
        kept = np.flatnonzero(end > start)
        kept = kept[np.argsort(rank[kept], kind="stable")]
        sequence, start, end, rank, piece, slices = (
            column[kept] for column in (sequence, start, end, rank, piece, slices)
        )
        size = end - start
        tokens = np.bincount(rank, size, ranks).astype(np.int64)  # (spans,) -> (ranks,)
        # Prefix sums of sizes over all spans, less those of the ranks before: (spans,).
        offset = np.cumsum(size) - size - (np.cumsum(tokens) - tokens)[rank]
        return Layout(sequence, start, end, rank, offset, piece, slices, tokens)

    @cached_property
    def load(self) -> Array:
        """float64 (ranks,): tokens of each rank; a token with 1 of h slices counts as 1/h."""
        return np.bincount(self.rank, (self.end - self.start) / self.slices, len(self.tokens))

    @cached_property
    def bounds(self) -> Array:
        """int64 (ranks + 1,): the spans of rank r are rows [bounds[r], bounds[r + 1])."""
        return np.searchsorted(self.rank, np.arange(len(self.tokens) + 1))

    def rows(self, rank: int) -> slice:
        """Rows of this table with the spans of `rank`."""
        return slice(int(self.bounds[rank]), int(self.bounds[rank + 1]))


@dataclass(frozen=True)
class Moves:
    """Runs of tokens to be copied from one layout's buffers to another's.

    Sorted by (source, target, source_offset). Rows with source == target are copies inside a
    rank. Sender and receiver list the rows between them in the same order, so these are one
    message that needs no header.

    Attributes:
        source, target: int64 (moves,), ranks.
        source_offset, target_offset: int64 (moves,), first row in either rank's buffer.
        tokens: int64 (moves,), length of the run.
        piece, slices: int64 (moves,), which of the tokens' heads go; see `Layout`.
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
    """The moves that bring tokens from the layout `stream` to the layout `attention`.

    Args:
        stream: holds every token once, with all its heads.
        attention: any spans; a token may be in several of them, or in none.
        cu_seqlens: int64 (N + 1,), the batch's sequences in cumulative form.
    """
    # Tokens are numbered through the batch: sequence n is [cu_seqlens[n], cu_seqlens[n + 1]).
    held = cu_seqlens[stream.sequence] + stream.start  # (stream spans,)
    by_place = np.argsort(held, kind="stable")
    held = held[by_place]
    first = cu_seqlens[attention.sequence] + attention.start  # (attention spans,)
    end = first + attention.end - attention.start
    # Each span of `attention` is cut where spans of `stream` begin inside it: `span` and `a` are
    # the rows of either table that a move joins, (moves,) each.
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
    """One round of a ring's exchange. Arrays are int64 (seats,); entry i concerns seat i.

    Attributes:
        block: the seat whose keys and values seat i works on in this round.
        source: the seat that sends them to seat i (i itself in round 0).
        ready: the round in which that seat works on them itself; the transfer may begin when
            that round begins.
    """

    block: Array
    source: Array
    ready: int


@dataclass(frozen=True)
class Ring:
    """Ranks that share some sequences' attention: tokens over seats, heads inside a seat.

    A *seat* is a place in the ring. With G seats each sequence is cut into 2G chunks; seat i has
    chunk i (its *early* chunk) and chunk 2G − 1 − i (its *late* chunk), so that all seats have the
    same causal work: the zigzag of Zeppelin, arXiv 2509.21841, section 3.1. With G = 2:

        chunk    0   1   2   3
        seat     0   1   1   0

    In a member's buffer the ring's tokens are one *block*: the early chunks of all its sequences,
    then the late ones. Against the block of an earlier seat, all queries see its early keys and
    none sees its late ones; against that of a later seat, the late queries see all its keys.

    A seat is one rank, or several that divide its heads (USP, arXiv 2405.07719): then each of them
    has all of the seat's tokens, and each slice of heads has a ring of its own. A ring of one seat
    is Ulysses (arXiv 2309.14509).

    Attributes:
        ranks: int64 (nodes, seats a node, slices). Seat x · (seats a node) + l is ranks[x, l].
            If a seat's slices lie on several nodes, these count as one "node" here.
        sequences: int64 (S,), by place in the batch.
        chunks: int64 (S, 2G + 1), where each sequence's chunks begin and end. Sizes differ by one
            at most; a sequence shorter than 2G has empty ones. With G = 1 the early chunk is the
            whole sequence.
        offset: int64 (G · slices,), where the ring's block begins in each member's buffer.
    """

    ranks: Array
    sequences: Array
    chunks: Array
    offset: Array

    @property
    def seats(self) -> int:
        """G, the number of seats."""
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
        return np.diff(self.chunks, axis=1)[:, : self.seats].T  # (S, 2G) -> (S, G) -> (G, S)

    @cached_property
    def late(self) -> Array:
        """int64 (G, S): tokens of each seat's late chunks."""
        # (S, 2G) -> (S, G), the last chunk first -> (G, S)
        return np.diff(self.chunks, axis=1)[:, : self.seats - 1 : -1].T

    @cached_property
    def tokens(self) -> Array:
        """int64 (G,): tokens of each seat's block."""
        return (self.early + self.late).sum(axis=1)

    def rounds(self) -> list[Round]:
        """The rounds, in each of which every seat works on one block; its own comes first.

        A double ring. The inner ring passes blocks round a node. The outer ring passes each seat's
        block to the seat at the same place on the next node, so that a block enters each node
        once, and traffic between nodes is spread over all seats of a node and their NICs.
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
        stream: the layout of all layers but full attention. Shard sizes differ by one token at
            most, or as far as memory allows where that makes the sum of all work even. Each rank
            holds middle fragments of cut sequences first, then last ones, whole sequences and
            first fragments.
        attention: the layout of full attention. Each rank holds the blocks of `rings` in their
            order, then the sequences it has whole, in the batch's order.
        rings: the ones over most nodes first, then by falling size. Every rank works through its
            own in this order, so no circle of ranks can wait for each other.
        to_attention: the moves from `stream` to `attention`; o takes them backwards.
        waves: into how many equal parts the heads are cut. Attention does one part after the
            other, so that tokens of one part move while another is computed.
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
        """For each sequence that is not empty, its rows of `stream` in the order of positions."""
        order = np.lexsort((self.stream.start, self.stream.sequence))
        sequence = self.stream.sequence[order]
        bounds = [0, *(np.flatnonzero(np.diff(sequence)) + 1).tolist(), len(order)]
        return [order[a:b] for a, b in pairwise(bounds)] if len(order) else []

    @cached_property
    def crossing(self) -> list[Array]:
        """`fragments` of those sequences that are cut: that have more than one."""
        return [rows for rows in self.fragments if len(rows) > 1]

    @property
    def sliced(self) -> bool:
        """Whether any ring divides heads."""
        return any(ring.slices > 1 for ring in self.rings)

    def rings_of(self, rank: int) -> list[tuple[Ring, int]]:
        """The rings that `rank` is in, each with its member number there, in their order."""
        found = [(ring, np.flatnonzero(ring.members == rank)) for ring in self.rings]
        return [(ring, int(member[0])) for ring, member in found if len(member)]

    def whole(self, rank: int) -> slice:
        """Rows of `attention` with the sequences that `rank` holds whole, after its rings'."""
        rows = self.attention.rows(rank)
        blocks = sum(int(ring.tokens[m // ring.slices]) for ring, m in self.rings_of(rank))
        here = self.attention.offset[rows]
        return slice(rows.start + int(np.searchsorted(here, blocks)), rows.stop)
