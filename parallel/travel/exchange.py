"""Rows of tensors between ranks, where both ends know beforehand what is sent.

Every transfer is one batch of point-to-point sends and receives. Both ends have tables from the
same plan, so no rank waits for a message that nobody sends. `move` is differentiable; `begin_move`
and `Transfer.arrive` are its two halves, between which other work overlaps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.packing import accumulation_dtype
from parallel import timing
from parallel.peers import waiting_for

# Bytes sent to each rank since the process started; tests compare the simulator's counts with it.
sent_bytes: Counter[int] = Counter()


def post(
    sends: Mapping[int, Sequence[Tensor]],
    receives: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Start sending and receiving; the function returned waits until all is done.

    Tensors are contiguous, and sender and receiver list those between them in the same order.
    Until the wait is over none may be written to, and received ones not be read. Meta tensors,
    which hold no numbers, are neither sent nor received.

    Raises:
        LostRankError: a rank is gone, or does not answer within the group's timeout.
    """
    operations = [
        dist.P2POp(dist.irecv, tensor, peer, group)
        for peer, tensors in sorted(receives.items())
        for tensor in tensors
        if tensor.numel() and not tensor.is_meta
    ]
    for peer, tensors in sorted(sends.items()):
        for tensor in tensors:
            if tensor.numel() and not tensor.is_meta:
                operations.append(dist.P2POp(dist.isend, tensor, peer, group))
                sent_bytes[peer] += tensor.numel() * tensor.element_size()
    told = timing.observer() if operations else None
    left = told.now() if told else None
    with waiting_for(None):
        works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        came = told.now() if told else None
        # gloo gives a handle for each operation; NCCL one for all, which does not wait here.
        for i, work in enumerate(works):
            with waiting_for(operations[i].peer if len(works) == len(operations) else None):
                work.wait()
        operations.clear()  # it kept the tensors alive while they were sent
        if told:
            told.waited(left, came)

    return wait


@dataclass(frozen=True, eq=False)
class PeerRows:
    """Which rows of a tensor go to, or come from, each rank.

    Attributes:
        counts: number of rows for each rank that has any.
        rows: (Σ counts,) int64 on the device, rank after rank. A row may be there for several
            ranks; twice for one rank only if two of its fragments want the same token.
    """

    counts: dict[int, int]
    rows: Tensor

    def split(self, x: Tensor) -> dict[int, Tensor]:
        """(Σ counts, …) -> one (count, …) a rank."""
        return dict(zip(self.counts, x.split(list(self.counts.values())), strict=True))


def peer_rows(
    peer: np.ndarray, start: np.ndarray, count: np.ndarray, device: torch.device
) -> PeerRows:
    """The table of runs: rows [start, start + count) for `peer`; a peer's runs keep their order.

    Args:
        peer, start, count: (runs,) int.
    """
    by_peer = np.argsort(peer, kind="stable")
    peer, start, count = peer[by_peer], start[by_peer], count[by_peer]
    before = np.cumsum(count) - count  # exclusive prefix sum
    rows = np.repeat(start - before, count) + np.arange(count.sum())  # (runs,) -> (Σ count,)
    totals = np.bincount(peer, count).astype(np.int64)  # (runs,) -> (ranks,)
    counts = {int(r): int(totals[r]) for r in np.flatnonzero(totals)}
    return PeerRows(counts, to_device(rows.astype(np.int64), device))


@dataclass(frozen=True, eq=False)
class Table:
    """One rank's part in moving rows from a tensor to a result.

    Attributes:
        gives: rows of this rank's tensor, by the rank that they go to.
        takes: rows of this rank's result, by the rank that they come from. Rows that come from
            nowhere are zero; rows that come more than once are summed.
        rows: number of rows of the result.
        wide: the result has the dtype in which rows are summed, fp32 or fp64, and not that of the
            tensor; what travels has the tensor's, gradients too.
    """

    gives: PeerRows
    takes: PeerRows
    rows: int
    wide: bool = False

    def reversed(self, rows: int) -> Table:
        """The table that moves rows back, to a tensor of `rows` rows; each went to one place."""
        return Table(self.takes, self.gives, rows)


def move(
    tensors: Sequence[Tensor],
    tables: Sequence[Table],
    rank: int,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Move rows between ranks, each tensor by its table, all in one exchange.

    Differentiable: gradients travel back, and are summed where a row went to several places.

    Args:
        tensors: (rows, …) each.

    Returns:
        (table.rows, …) each, in the dtype of its tensor unless the table is `wide`.
    """
    return begin_move(tensors, tables, rank, group).arrive()


def begin_move(
    tensors: Sequence[Tensor],
    tables: Sequence[Table],
    rank: int,
    group: dist.ProcessGroup | None,
) -> Transfer:
    """Begin a `move`. Work between this call and `Transfer.arrive` overlaps the transfer.

    In the backward pass too: autograd runs functions in reverse, so gradients of the received
    rows travel while the gradients of the work in between are computed.
    """
    transfer = Transfer(tuple(tables), rank, group)
    transfer.ticket = _Begin.apply(transfer, *tensors)
    return transfer


class Transfer:
    """A move that was begun; `arrive` ends it."""

    def __init__(self, tables: tuple[Table, ...], rank: int, group: dist.ProcessGroup | None):
        self._tables, self._rank, self._group = tables, rank, group
        self._rows: list[int] = []
        self._dtypes: list[torch.dtype] = []  # of the tensors
        self._finish: Callable[[], list[Tensor]] = list
        self.ticket: Tensor

    def arrive(self) -> list[Tensor]:
        """Wait for the rows: (table.rows, …) for each tensor. May be called once."""
        ticket = self.ticket
        del self.ticket  # its graph refers to this object: a cycle that would keep both alive
        return list(_Arrive.apply(self, ticket))

    def start(self, tensors: Sequence[Tensor]) -> None:
        self._rows = [len(tensor) for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        dtypes = [
            accumulation_dtype(dtype) if table.wide else dtype
            for dtype, table in zip(self._dtypes, self._tables, strict=True)
        ]
        results = [
            tensor.new_zeros(table.rows, *tensor.shape[1:], dtype=dtype)
            for tensor, table, dtype in zip(tensors, self._tables, dtypes, strict=True)
        ]
        gives, takes = [t.gives for t in self._tables], [t.takes for t in self._tables]
        self._deliver(tensors, gives, results, takes, dtypes)

    def start_back(self, gradients: Sequence[Tensor]) -> None:
        gradients = [x.to(dtype) for x, dtype in zip(gradients, self._dtypes, strict=True)]
        sums = [
            gradient.new_zeros(rows, *gradient.shape[1:], dtype=accumulation_dtype(gradient.dtype))
            for gradient, rows in zip(gradients, self._rows, strict=True)
        ]
        gives, takes = [t.gives for t in self._tables], [t.takes for t in self._tables]
        self._deliver(gradients, takes, sums, gives, self._dtypes)

    def finish(self) -> list[Tensor]:
        """Wait for what `start` or `start_back` began, and return it."""
        done, self._finish = self._finish(), list
        return done

    def _deliver(
        self,
        sources: Sequence[Tensor],
        gives: Sequence[PeerRows],
        targets: list[Tensor],
        takes: Sequence[PeerRows],
        dtypes: Sequence[torch.dtype],
    ) -> None:
        arrived = _deliver(sources, gives, targets, takes, self._rank, self._group)

        def finish() -> list[Tensor]:
            arrived()
            return [x.to(dtype) for x, dtype in zip(targets, dtypes, strict=True)]

        self._finish = finish


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> Tensor:
        ctx.transfer = transfer
        transfer.start(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *ctx.transfer.finish()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: Transfer, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return tuple(transfer.finish())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.transfer.start_back(gradients)
        return None, gradients[0].new_empty(0)


def _deliver(
    sources: Sequence[Tensor],
    gives: Sequence[PeerRows],
    targets: Sequence[Tensor],
    takes: Sequence[PeerRows],
    rank: int,
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Add rows `gives` of `sources`, of all ranks, to rows `takes` of `targets`.

    The function returned waits until it is done.
    """
    sends: dict[int, list[Tensor]] = {}
    receives: dict[int, list[Tensor]] = {}
    arrivals = []
    for source, given, taken in zip(sources, gives, takes, strict=True):
        leaving = given.split(source.index_select(0, given.rows))  # (rows, …) -> (count, …) a rank
        arriving = taken.split(source.new_empty(len(taken.rows), *source.shape[1:]))
        if rank in leaving:
            arriving[rank] = leaving.pop(rank)
        for peer, rows in leaving.items():
            sends.setdefault(peer, []).append(rows)
        for peer, rows in arriving.items():
            if peer != rank:
                receives.setdefault(peer, []).append(rows)
        arrivals.append(arriving)
    wait = post(sends, receives, group)

    def finish() -> None:
        wait()
        for target, taken, arriving in zip(targets, takes, arrivals, strict=True):
            places = taken.split(taken.rows)
            # Rank after rank, whose rows are distinct: a row's terms are summed in one order.
            for peer, rows in arriving.items():
                target.index_add_(0, places[peer], rows.to(target.dtype))

    return finish


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.clone()
