"""One stream: the sequences of a batch laid end to end and cut evenly over the ranks.

A cut may fall anywhere. What a layer then needs from other ranks follows from the batch's
plan, which every rank has made for itself from the lengths alone (`parallel.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.chain import Links
from parallel.config import Attention, ParallelConfig
from parallel.exchange import Table, parcels, to_device
from parallel.layout import Plan
from parallel.planner import Planner, filled
from parallel.world import World

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
    def bounds(self) -> np.ndarray:
        """(ranks + 1,): rank r holds the tokens [bounds[r], bounds[r + 1]) of the stream."""
        return np.concatenate([[0], np.cumsum(self.plan.stream.tokens)])

    @cached_property
    def crossing(self) -> bool:
        """Whether any sequence lies on more than one rank: alike on all of them."""
        return not np.isin(self.bounds[1:-1], self.plan.cu_seqlens).all()

    @cached_property
    def links(self) -> Links:
        """Those whose sequences reach into this shard, or go on from it."""
        spans = self.plan.stream.rows(self.rank)
        first, last = self.plan.stream.sequence[[spans.start, spans.stop - 1]]
        begin, end = self.plan.cu_seqlens[first], self.plan.cu_seqlens[last + 1]
        return Links(
            rank=self.rank,
            before=self.rank - self._holder(begin),
            after=self._holder(end - 1) - self.rank,
            through=spans.stop - spans.start == 1,
        )

    def halo(self, reach: int) -> Table:
        """The up to `reach` tokens before this shard that belong to its first sequence.

        Shards shorter than the reach make it span several ranks before.
        """
        return self.once(("halo", reach), lambda: self._halo(reach))

    def _halo(self, reach: int) -> Table:
        bounds, rank = self.bounds, self.rank
        first = self._halo_start(rank, reach)
        sources = np.arange(self._holder(first), rank)
        begins = np.maximum(bounds[sources], first)
        takes = parcels(sources, begins - first, bounds[sources + 1] - begins, self.device)
        takers = np.arange(rank + 1, rank + self.links.after + 1)
        wanted = np.array([self._halo_start(int(taker), reach) for taker in takers], dtype=np.int64)
        begins = np.clip(wanted, bounds[rank], bounds[rank + 1])
        gives = parcels(takers, begins - bounds[rank], bounds[rank + 1] - begins, self.device)
        return Table(gives, takes, int(bounds[rank] - first))

    def _halo_start(self, rank: int, reach: int) -> int:
        begin = self.bounds[rank]
        sequence = np.searchsorted(self.plan.cu_seqlens, begin, side="right") - 1
        return int(max(begin - reach, self.plan.cu_seqlens[sequence]))

    def _holder(self, token: int) -> int:
        return int(np.searchsorted(self.bounds, token, side="right")) - 1


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
    def later(self) -> Tensor:
        """`cu_seqlens` of all fragments but the first."""
        return self.cu_seqlens[1:] - self.lengths[0]


def shard(lengths: Sequence[int] | np.ndarray, device: torch.device | str, start: int = 0) -> Shard:
    """A shard of whole sequences; `start` is the position of each one's first token."""
    each = np.asarray(lengths, dtype=np.int64)
    return _shard(each, np.full(len(each), start), torch.device(device), None)


def _shard(
    lengths: np.ndarray, starts: np.ndarray, device: torch.device, view: View | None
) -> Shard:
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(cu_seqlens[-1]) + np.repeat(starts - cu_seqlens[:-1], lengths)
    return Shard(
        lengths=tuple(int(length) for length in lengths),
        cu_seqlens=to_device(cu_seqlens.astype(np.int32), device),
        positions=to_device(positions, device),
        view=view,
    )


def distribute(
    tokens: np.ndarray,
    labels: np.ndarray,
    cu_seqlens: np.ndarray,
    world: World,
    config: ParallelConfig | None = None,
    planner: Planner | None = None,
) -> tuple[Tensor, Tensor, Shard]:
    """This rank's part of a stream, on its device.

    Args:
        tokens, labels: (T,) int64, the whole stream; labels are shifted already, −100 for none.
        cu_seqlens: (N + 1,) int.
        planner: that has the batch's plan, or makes it; one for `config` unless given.

    Returns:
        tokens and labels (t,) int64 of this rank's shard, and the shard; t differs by at most
        one over the ranks. Sequences may change places in the stream (`Plan.order`). Where
        there are fewer tokens than ranks, the stream ends with sequences of one token without
        a label, so that every rank holds something and takes part in every exchange.
    """
    lengths = filled(np.diff(cu_seqlens), world.size)
    missing = int(lengths.sum()) - len(tokens)
    tokens = np.concatenate([tokens, np.zeros(missing, tokens.dtype)])
    labels = np.concatenate([labels, np.full(missing, -100, labels.dtype)])
    if world.size == 1:
        return (
            to_device(tokens, world.device),
            to_device(labels, world.device),
            shard(lengths[lengths > 0], world.device),
        )
    if planner is None:
        with closing(Planner(config or ParallelConfig(), world.topology)) as own:
            made, attention = own.plan(lengths), own.config.attention
    else:
        made, attention = planner.plan(lengths), planner.config.attention
    view = View(made, world.rank, world.group, attention, world.device)
    spans = made.stream.rows(world.rank)
    sequence, starts, ends = (
        column[spans] for column in (made.stream.sequence, made.stream.start, made.stream.end)
    )
    # From places in the stream to places in the batch, whose sequences lie in another order.
    begins = np.cumsum(lengths) - lengths
    first = begins[made.order[sequence]] + starts
    sizes = ends - starts
    here = np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)
    return (
        to_device(tokens[here], world.device),
        to_device(labels[here], world.device),
        _shard(sizes, starts, world.device, view),
    )
