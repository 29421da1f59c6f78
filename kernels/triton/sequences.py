"""Chunks of rows that never cross a sequence, found on the device without a table.

Rows are those of all batch rows end to end. Without `cu_seqlens` they are `length` to a
sequence; with it, `bounds` holds N + 1 rising rows, and what lies past the last one is treated
as one more sequence, number N, that nobody owns. Sequence n begins at program

    bounds[n] // ROWS + n,

which leaves it enough programs for its rows, whatever the bounds: every program finds its chunk
by a binary search, the CPU knows their number from shapes alone, and a few find no rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def packed_bounds(cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """int64 on the device; None where batch rows are the sequences."""
    return None if cu_seqlens is None else cu_seqlens.to(device=device, dtype=torch.int64)


def programs(batch: int, length: int, bounds: Tensor | None, ROWS: int) -> int:
    """How many chunks of at most ROWS rows there may be."""
    if bounds is None:
        return batch * -(-length // ROWS)
    return length // ROWS + len(bounds)


@triton.jit
def chunk_of(program, bounds, N, length, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """A program's sequence, that one's first row and end, and the chunk's first row; int64.

    The chunk is rows first to min(first + ROWS, end), of which there may be none.
    """
    program = program.to(tl.int64)
    if PACKED:
        n = program * 0
        step = program * 0 + 1
        while step < N:
            step = step * 2
        while step > 0:
            further = tl.minimum(n + step, N)
            begins = tl.load(bounds + further) // ROWS + further
            n = tl.where(begins <= program, further, n)
            step = step // 2
        start = tl.load(bounds + n)
        end = tl.where(n < N, tl.load(bounds + tl.minimum(n + 1, N)), length)
        return n, start, end, start + (program - start // ROWS - n) * ROWS
    else:
        chunks = (length + ROWS - 1) // ROWS
        n = program // chunks
        return n, n * length, n * length + length, n * length + (program % chunks) * ROWS


@triton.jit
def span(n, bounds, length, PACKED: tl.constexpr):
    """First row and end of sequence n, int64."""
    if PACKED:
        return tl.load(bounds + n), tl.load(bounds + n + 1)
    else:
        return n.to(tl.int64) * length, n.to(tl.int64) * length + length


@triton.jit
def load_rows(x, first, shift, lowest, end, c, D, ROWS: tl.constexpr):
    """Rows first + shift … of (rows, D) in fp32, zeros outside lowest … end.

    The address is a 64-bit scalar and a tile of 32-bit offsets.
    """
    row = tl.arange(0, ROWS) + shift
    kept = (row >= (lowest - first).to(tl.int32)) & (row < (end - first).to(tl.int32))
    place = x + first * D + (row[:, None] * D + c[None, :])
    return tl.load(place, mask=kept[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, first, lowest, end, c, D, ROWS: tl.constexpr):
    """The counterpart of `load_rows`."""
    row = tl.arange(0, ROWS)
    kept = (row >= (lowest - first).to(tl.int32)) & (row < (end - first).to(tl.int32))
    place = x + first * D + (row[:, None] * D + c[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=kept[:, None] & (c < D)[None, :])
