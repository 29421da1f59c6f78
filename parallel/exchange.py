"""Tensors between ranks: who sends what to whom is known on the host beforehand.

Every transfer is a batch of sends and receives between the ranks that need it; both ends read
the same tables, so no rank waits for a message that nobody sends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.packing import accumulation_dtype

# Bytes sent to each rank since the start of the process: what the simulator's counts are
# checked against.
sent_bytes: Counter[int] = Counter()


def post(
    sends: Mapping[int, Sequence[Tensor]],
    receives: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Start sending to and receiving from ranks; the function returned waits for the end.

    The tensors are contiguous, and both ends list those of one message in the same order.
    None may be touched before the wait.
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
    works = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> None:
        for work in works:
            work.wait()
        operations.clear()  # until here it kept the tensors alive

    return wait


class Block(NamedTuple):
    """Rows, and heads of them, of a tensor (rows, heads, …) that go to or come from a rank."""

    peer: int
    rows: slice
    heads: slice = slice(None)


@dataclass(frozen=True, eq=False)
class Table:
    """What one rank gives and takes when rows change places.

    Attributes:
        gives: blocks of the tensor here; those to one rank in the order in which it takes them.
        takes: disjoint blocks of the result, likewise.
        rows, heads: of the result; a row that nobody gives is zero. No `heads`: as in the input.
    """

    gives: tuple[Block, ...]
    takes: tuple[Block, ...]
    rows: int
    heads: int | None = None


def move(
    tensors: Sequence[Tensor],
    tables: Sequence[Table],
    rank: int,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Move rows between ranks, each tensor (rows, heads, …) by its table, all in one exchange.

    Differentiable: gradients travel back, and add up where a row was given more than once.
    """
    return list(_Move.apply(tuple(tables), rank, group, *tensors))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tables: tuple[Table, ...],
        rank: int,
        group: dist.ProcessGroup | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.tables, ctx.rank, ctx.group = tables, rank, group
        ctx.shapes = [tensor.shape for tensor in tensors]
        results = []
        for tensor, table in zip(tensors, tables, strict=True):
            heads = tensor.shape[1] if table.heads is None else table.heads
            results.append(tensor.new_zeros(table.rows, heads, *tensor.shape[2:]))
        gives, takes = [table.gives for table in tables], [table.takes for table in tables]
        _carry_over(tensors, gives, results, takes, rank, group)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        sums = [
            gradient.new_zeros(shape, dtype=accumulation_dtype(gradient.dtype))
            for gradient, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        gives, takes = [t.takes for t in ctx.tables], [t.gives for t in ctx.tables]
        _carry_over(gradients, gives, sums, takes, ctx.rank, ctx.group)
        typed = (s.to(gradient.dtype) for s, gradient in zip(sums, gradients, strict=True))
        return None, None, None, *typed


def _carry_over(
    sources: Sequence[Tensor],
    gives: Sequence[tuple[Block, ...]],
    targets: Sequence[Tensor],
    takes: Sequence[tuple[Block, ...]],
    rank: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Add the given blocks of `sources` to the taken blocks of `targets`, on all ranks."""
    sends: dict[int, list[Tensor]] = {}
    receives: dict[int, list[Tensor]] = {}
    arriving: list[tuple[Tensor, Tensor]] = []  # where to, what
    for source, given, target, taken in zip(sources, gives, targets, takes, strict=True):
        kept = [source[block.rows, block.heads] for block in given if block.peer == rank]
        for block in given:
            if block.peer != rank:
                piece = source[block.rows, block.heads].contiguous()
                sends.setdefault(block.peer, []).append(piece)
        for block in taken:
            place = target[block.rows, block.heads]
            if block.peer == rank:
                place.add_(kept.pop(0))
            else:
                piece = torch.empty(place.shape, dtype=source.dtype, device=source.device)
                receives.setdefault(block.peer, []).append(piece)
                arriving.append((place, piece))
    post(sends, receives, group)()
    for place, piece in arriving:
        place.add_(piece)
