"""Tensors between ranks: who sends what to whom is known on the host beforehand.

Every transfer is a batch of sends and receives between the ranks that need it; both ends read
the same tables, so no rank waits for a message that nobody sends.
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
from parallel.peers import waiting_for

# Bytes sent to each rank since the start of the process: what the simulator's counts are
# checked against.
sent_bytes: Counter[int] = Counter()


def post(
    sends: Mapping[int, Sequence[Tensor]],
    receives: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Start sending to and receiving from ranks; the function returned waits for the end.

    The tensors are contiguous, and both ends list those of one pair in the same order. None
    may be touched before the wait.
    """
    operations = [
        dist.P2POp(dist.irecv, tensor, peer, group)
        for peer, tensors in sorted(receives.items())
        for tensor in tensors
        if tensor.numel()
    ]
    for peer, tensors in sorted(sends.items()):
        for tensor in tensors:
            if tensor.numel():
                operations.append(dist.P2POp(dist.isend, tensor, peer, group))
                sent_bytes[peer] += tensor.numel() * tensor.element_size()
    with waiting_for(None):
        works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        # gloo gives a handle for each operation; NCCL one for all, which does not wait here.
        for i, work in enumerate(works):
            with waiting_for(operations[i].peer if len(works) == len(operations) else None):
                work.wait()
        operations.clear()  # until here it kept the tensors alive

    return wait


@dataclass(frozen=True, eq=False)
class Parcels:
    """Rows of a tensor, by the rank that they go to or come from.

    Attributes:
        counts: how many there are for each rank.
        rows: (Σ counts,) int64 on the device, rank after rank. Those of one rank are distinct,
            but where two fragments of one sequence want the same token.
    """

    counts: dict[int, int]
    rows: Tensor

    def split(self, x: Tensor) -> dict[int, Tensor]:
        """(Σ counts, …) by rank."""
        return dict(zip(self.counts, x.split(list(self.counts.values())), strict=True))


def parcels(
    peer: np.ndarray, start: np.ndarray, count: np.ndarray, device: torch.device
) -> Parcels:
    """Parcels of runs: `count` rows from `start` for `peer`, in this order for each peer.

    Args:
        peer, start, count: (runs,) int.
    """
    by_peer = np.argsort(peer, kind="stable")
    peer, start, count = peer[by_peer], start[by_peer], count[by_peer]
    before = np.cumsum(count) - count
    rows = np.repeat(start - before, count) + np.arange(count.sum())
    totals = np.bincount(peer, count).astype(np.int64)
    counts = {int(r): int(totals[r]) for r in np.flatnonzero(totals)}
    return Parcels(counts, to_device(rows.astype(np.int64), device))


@dataclass(frozen=True, eq=False)
class Table:
    """What one rank gives and takes when rows change places.

    Attributes:
        gives: rows of the tensor here.
        takes: rows of the result; what nobody gives is zero.
        rows: of the result.
    """

    gives: Parcels
    takes: Parcels
    rows: int

    def reversed(self, rows: int) -> Table:
        """The way back to a tensor of so many rows, if each row went to one place."""
        return Table(self.takes, self.gives, rows)


def move(
    tensors: Sequence[Tensor],
    tables: Sequence[Table],
    rank: int,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Move rows between ranks, each tensor (rows, …) by its table, all in one exchange.

    Differentiable: gradients travel back, and add up where a row was given more than once.
    """
    return depart(tensors, tables, rank, group).arrive()


def depart(
    tensors: Sequence[Tensor],
    tables: Sequence[Table],
    rank: int,
    group: dist.ProcessGroup | None,
) -> Journey:
    """Begin a `move`. What is computed before it arrives is computed while rows travel.

    So it is backward: the gradients of what arrives travel while those of what was computed in
    between are found. (Autograd goes through functions in the reverse of their order.)
    """
    journey = Journey(tuple(tables), rank, group)
    journey.ticket = _Depart.apply(journey, *tensors)
    return journey


class Journey:
    """Rows on their way between ranks."""

    def __init__(self, tables: tuple[Table, ...], rank: int, group: dist.ProcessGroup | None):
        self._tables, self._rank, self._group = tables, rank, group
        self._rows: list[int] = []
        self._finish: Callable[[], list[Tensor]] = list
        self.ticket: Tensor

    def arrive(self) -> list[Tensor]:
        """Wait for the rows, once: each tensor's (rows of its table, …)."""
        ticket = self.ticket
        del self.ticket  # which holds on to the journey
        return list(_Arrive.apply(self, ticket))

    def start(self, tensors: Sequence[Tensor]) -> None:
        self._rows = [len(tensor) for tensor in tensors]
        results = [
            tensor.new_zeros(table.rows, *tensor.shape[1:])
            for tensor, table in zip(tensors, self._tables, strict=True)
        ]
        self._deliver(
            tensors, [t.gives for t in self._tables], results, [t.takes for t in self._tables]
        )

    def start_back(self, gradients: Sequence[Tensor]) -> None:
        sums = [
            gradient.new_zeros(rows, *gradient.shape[1:], dtype=accumulation_dtype(gradient.dtype))
            for gradient, rows in zip(gradients, self._rows, strict=True)
        ]
        self._deliver(
            gradients, [t.takes for t in self._tables], sums, [t.gives for t in self._tables]
        )

    def finish(self) -> list[Tensor]:
        """What was started, in the direction in which it was."""
        done, self._finish = self._finish(), list
        return done

    def _deliver(
        self,
        sources: Sequence[Tensor],
        gives: Sequence[Parcels],
        targets: list[Tensor],
        takes: Sequence[Parcels],
    ) -> None:
        arrived = _deliver(sources, gives, targets, takes, self._rank, self._group)

        def finish() -> list[Tensor]:
            arrived()
            return [x.to(source.dtype) for x, source in zip(targets, sources, strict=True)]

        self._finish = finish


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, *tensors: Tensor) -> Tensor:
        ctx.journey = journey
        journey.start(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *ctx.journey.finish()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.journey = journey
        return tuple(journey.finish())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.journey.start_back(gradients)
        return None, gradients[0].new_empty(0)


def _deliver(
    sources: Sequence[Tensor],
    gives: Sequence[Parcels],
    targets: Sequence[Tensor],
    takes: Sequence[Parcels],
    rank: int,
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Add the given rows of `sources` to the taken rows of `targets`, on all ranks.

    The function returned waits for the end.
    """
    sends: dict[int, list[Tensor]] = {}
    receives: dict[int, list[Tensor]] = {}
    arrivals = []
    for source, given, taken in zip(sources, gives, takes, strict=True):
        leaving = given.split(source.index_select(0, given.rows))
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
            # Rank after rank: the rows of one are distinct, so that sums have one order.
            for peer, rows in arriving.items():
                target.index_add_(0, places[peer], rows.to(target.dtype))

    return finish


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, so that a GPU need not be waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.clone()
