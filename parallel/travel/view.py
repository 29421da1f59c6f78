"""A batch's plan as one rank sees it, and the shard of the stream that it holds.

A rank's fragments come in four groups, in this order: middle fragments of cut sequences, last
ones, whole sequences, and first fragments. So those that *continue* a sequence, whose first tokens
lie in another fragment, come first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.recurrences import Packed
from parallel.config import Attention
from parallel.planning.layout import Layout, Plan, moves
from parallel.planning.passing import Passing
from parallel.travel.exchange import Table, peer_rows, to_device
from parallel.travel.states import Chain, Chains, Group, Key

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class View:
    """A batch's plan as one rank sees it, with the tables that its layers share.

    Attributes:
        plan: the same on all ranks; on the host.
        rank: this rank.
        group: all ranks, for the messages of layers.
        attention: the strategy of full attention.
        device: of this rank; tables of rows go there.
    """

    plan: Plan
    rank: int
    group: dist.ProcessGroup | None
    attention: Attention
    device: torch.device
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make()` returns, made once for each key: a table that the batch's layers share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def crossing(self) -> bool:
        """Whether any sequence of the batch is cut. The same on all ranks."""
        return bool(self.plan.crossing)

    @cached_property
    def continued(self) -> int:
        """How many of this rank's fragments continue a sequence. They are its first ones."""
        stream = self.plan.stream
        return int((stream.start[stream.rows(self.rank)] > 0).sum())

    @cached_property
    def first(self) -> int:
        """How many of this rank's fragments are the first of a cut sequence: its last ones."""
        stream = self.plan.stream
        rows = stream.rows(self.rank)
        lengths = np.diff(self.plan.cu_seqlens)[stream.sequence[rows]]
        return int(((stream.start[rows] == 0) & (stream.end[rows] < lengths)).sum())

    def chains(self, heads: int, least: int) -> Chains:
        """The cut sequences with a fragment on this rank's node, whose states it helps to pass.

        Args:
            heads: of a state.
            least: heads that a rank composes at least; see `planning.passing`.
        """
        return self.cached(("chains", heads, least), lambda: self._chains(heads, least))

    def _chains(self, heads: int, least: int) -> Chains:
        topology = self.plan.topology
        node, mine = topology.node(self.plan.stream.rank), topology.node(self.rank)
        shared = [rows for rows in self.plan.crossing if mine in node[rows]]
        forward, backward = (
            [self._chain(x[::way], heads, least) for x in shared] for way in (1, -1)
        )
        here = [
            (rows, (c, number), (number == 0) - (number == chain.passing.last))
            for c, chain in enumerate(forward)
            for number, rows in chain.rows.items()
        ]
        middle, last, first = (
            self._group([one for one in here if one[2] == kind]) for kind in (0, -1, 1)
        )
        return Chains(forward, backward, middle, last, first, self.rank, self.group)

    def _group(self, fragments: list[tuple[slice, Key, int]]) -> Group | None:
        if not fragments:
            return None
        fragments.sort(key=lambda one: one[0].start)
        lengths = tuple(rows.stop - rows.start for rows, *_ in fragments)
        bounds = np.cumsum((0, *lengths)).astype(np.int32)
        cu_seqlens = to_device(bounds, self.device) if len(lengths) > 1 else None
        rows = slice(fragments[0][0].start, fragments[-1][0].stop)
        assert rows.stop - rows.start == bounds[-1]
        return Group([key for _, key, _ in fragments], rows, Packed(lengths, cu_seqlens))

    def _chain(self, rows: np.ndarray, heads: int, least: int) -> Chain:
        stream, me = self.plan.stream, self.rank
        passing = Passing(stream.rank[rows].tolist(), heads, self.plan.topology, least)
        turns = [[m for m in turn if me in (m.source, m.target)] for turn in passing.turns()]
        begin, size = stream.offset[rows], (stream.end - stream.start)[rows]
        here = np.flatnonzero(stream.rank[rows] == me).tolist()
        return Chain(
            passing, turns, {n: slice(int(begin[n]), int(begin[n] + size[n])) for n in here}
        )

    def halo(self, reach: int) -> Table:
        """Table that fetches the `reach` tokens before each fragment that continues a sequence.

        (t, …) -> (continued · reach, …): `reach` rows for each such fragment, the last one the
        token just before it; rows before the sequence's first token are zero.
        """
        return self.cached(("halo", reach), lambda: self._halo(reach))

    def _halo(self, reach: int) -> Table:
        stream = self.plan.stream
        on = np.flatnonzero(stream.start > 0) if reach else np.zeros(0, np.int64)
        rank, end = stream.rank[on], stream.start[on]
        start = np.maximum(end - reach, 0)
        place = np.arange(len(on)) - np.searchsorted(rank, rank)  # number among its rank's
        offset = place * reach + reach - (end - start)
        one = np.ones_like(on)
        wanted = Layout(
            stream.sequence[on], start, end, rank, offset, 0 * one, one, 0 * stream.tokens
        )
        return self._fetched(wanted, self.continued * reach)

    def with_preceding(self, reach: int) -> tuple[Table, Tensor, int]:
        """Table that fetches every fragment with the up to `reach` tokens of its sequence before.

        Returns:
            the table, (t, …) -> (r, …); `cu_seqlens` (fragments + 1,) int32 of these r rows; and
            the number of rows of the longest.
        """
        return self.cached(("with_preceding", reach), lambda: self._with_preceding(reach))

    def _with_preceding(self, reach: int) -> tuple[Table, Tensor, int]:
        stream = self.plan.stream
        start = np.maximum(stream.start - reach, 0)
        wanted = Layout.stack(stream.sequence, start, stream.end, stream.rank, len(stream.tokens))
        sizes = (stream.end - start)[stream.rows(self.rank)]
        cu_seqlens = np.append(0, np.cumsum(sizes))
        table = self._fetched(wanted, int(cu_seqlens[-1]))
        return table, to_device(cu_seqlens.astype(np.int32), self.device), int(sizes.max())

    def _fetched(self, wanted: Layout, rows: int) -> Table:
        """Table from the stream to the layout `wanted`, which may hold tokens more than once.

        Args:
            rows: number of this rank's rows in `wanted`.
        """
        found = moves(self.plan.stream, wanted, self.plan.cu_seqlens)
        gives, takes = found.sent(self.rank), found.received(self.rank)
        tokens = found.tokens
        return Table(
            peer_rows(found.target[gives], found.source_offset[gives], tokens[gives], self.device),
            peer_rows(found.source[takes], found.target_offset[takes], tokens[takes], self.device),
            rows,
        )


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a stream that one rank holds.

    Attributes:
        lengths: tokens of each of the N fragments, on the host, so that no device is waited for.
        cu_seqlens: (N + 1,) int32 on the device, the same in cumulative form.
        positions: (t,) int64 on the device, each token's position in its sequence.
        view: the batch's plan, seen from this rank. None if no other rank shares the stream; then
            every fragment starts its sequence, or continues one from a cache.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor
    view: View | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def parts(self) -> tuple[int, int, int]:
        """Numbers of tokens: in fragments that continue a sequence, in whole sequences, and in
        first fragments of cut ones. They lie in this order."""
        continued, first = (self.view.continued, self.view.first) if self.view else (0, 0)
        end = len(self.lengths) - first
        return (
            sum(self.lengths[:continued]),
            sum(self.lengths[continued:end]),
            sum(self.lengths[end:]),
        )

    @cached_property
    def cu_seqlens_whole(self) -> Tensor:
        """`cu_seqlens` of the whole sequences, counted from the first one."""
        continued, first = (self.view.continued, self.view.first) if self.view else (0, 0)
        bounds = self.cu_seqlens[continued : len(self.cu_seqlens) - first]
        return bounds - self.parts[0]
