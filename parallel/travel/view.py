"""A batch's plan as one rank sees it, and the shard of the stream that it holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.config import Attention
from parallel.planning.layout import Layout, Plan, moves
from parallel.planning.passing import Passing
from parallel.travel.chain import Chain, Chains
from parallel.travel.exchange import Table, parcels, to_device

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class View:
    """A batch's plan as one rank sees it. All of it is on the host.

    Attributes:
        plan: alike on all ranks.
        group: all ranks, for the messages of layers.
        attention: the strategy of full attention.
        device: of the rank.
    """

    plan: Plan
    rank: int
    group: dist.ProcessGroup | None
    attention: Attention
    device: torch.device
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes: a table that the layers of a batch share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def crossing(self) -> bool:
        """Whether any sequence is in several fragments: alike on all ranks."""
        return bool(self.plan.crossing)

    @cached_property
    def entering(self) -> int:
        """Fragments of this rank that go on from elsewhere. They are its first."""
        stream = self.plan.stream
        return int((stream.start[stream.rows(self.rank)] > 0).sum())

    def chains(self, heads: int) -> Chains:
        """The sequences whose states, of so many heads, this rank helps to pass."""
        return self.once(("chains", heads), lambda: self._chains(heads))

    def _chains(self, heads: int) -> Chains:
        each = self.plan.topology.ranks_per_node
        node = self.plan.stream.rank // each
        shared = [rows for rows in self.plan.crossing if self.rank // each in node[rows]]
        forward, backward = ([self._chain(x[::way], heads) for x in shared] for way in (1, -1))
        return Chains(forward, backward, self.rank, self.group)

    def _chain(self, rows: np.ndarray, heads: int) -> Chain:
        stream, me = self.plan.stream, self.rank
        passing = Passing(stream.rank[rows].tolist(), heads, self.plan.topology)
        turns = [[m for m in turn if me in (m.source, m.target)] for turn in passing.turns()]
        begin, size = stream.offset[rows], (stream.end - stream.start)[rows]
        here = np.flatnonzero(stream.rank[rows] == me).tolist()
        return Chain(
            passing, turns, {n: slice(int(begin[n]), int(begin[n] + size[n])) for n in here}
        )

    def halo(self, reach: int) -> Table:
        """The up to `reach` tokens before each fragment that goes on from elsewhere.

        Into `reach` rows for each, which end with the token before the fragment; what lies
        before the sequence's first token is zero.
        """
        return self.once(("halo", reach), lambda: self._halo(reach))

    def _halo(self, reach: int) -> Table:
        stream = self.plan.stream
        on = np.flatnonzero(stream.start > 0) if reach else np.zeros(0, np.int64)
        rank, end = stream.rank[on], stream.start[on]
        start = np.maximum(end - reach, 0)
        place = np.arange(len(on)) - np.searchsorted(rank, rank)  # among those of the rank
        offset = place * reach + reach - (end - start)
        one = np.ones_like(on)
        wanted = Layout(
            stream.sequence[on], start, end, rank, offset, 0 * one, one, 0 * stream.tokens
        )
        return self._fetched(wanted, self.entering * reach)

    def reaching(self, reach: int) -> tuple[Table, Tensor, int]:
        """Every fragment with the up to `reach` tokens before it: the way there, its
        `cu_seqlens`, and the tokens of the longest."""
        return self.once(("reaching", reach), lambda: self._reaching(reach))

    def _reaching(self, reach: int) -> tuple[Table, Tensor, int]:
        stream = self.plan.stream
        start = np.maximum(stream.start - reach, 0)
        wanted = Layout.stack(stream.sequence, start, stream.end, stream.rank, len(stream.tokens))
        sizes = (stream.end - start)[stream.rows(self.rank)]
        cu_seqlens = np.append(0, np.cumsum(sizes))
        table = self._fetched(wanted, int(cu_seqlens[-1]))
        return table, to_device(cu_seqlens.astype(np.int32), self.device), int(sizes.max())

    def _fetched(self, wanted: Layout, rows: int) -> Table:
        """From the stream to a layout that may hold tokens more than once."""
        found = moves(self.plan.stream, wanted, self.plan.cu_seqlens)
        gives, takes = found.sent(self.rank), found.received(self.rank)
        tokens = found.tokens
        return Table(
            parcels(found.target[gives], found.source_offset[gives], tokens[gives], self.device),
            parcels(found.source[takes], found.target_offset[takes], tokens[takes], self.device),
            rows,
        )


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a stream that one rank holds.

    Attributes:
        lengths: tokens of each fragment, on the host: no device is asked for them.
        cu_seqlens: (N + 1,) int32 on the device, the same in cumulative form.
        positions: (T,) int64 on the device, each token's position in its sequence.
        view: how it lies among the shards of other ranks; None if there are none, and every
            fragment begins its sequence or goes on from a cache.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor
    view: View | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def begun(self) -> Tensor | None:
        """`cu_seqlens` of the fragments that go on from elsewhere; None if there is but one."""
        entering = self.view.entering if self.view else 0
        return self.cu_seqlens[: entering + 1] if entering != 1 else None

    @cached_property
    def later(self) -> Tensor:
        """`cu_seqlens` of all other fragments."""
        entering = self.view.entering if self.view else 0
        return self.cu_seqlens[entering:] - sum(self.lengths[:entering])
