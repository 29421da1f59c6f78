"""Chunks of rows that never cross a sequence, found by each program without a table.

All batch rows lie end to end. Without `cu_seqlens` each sequence has `length` rows. With it,
`bounds` holds N + 1 rising rows, and the rows past the last one count as sequence number N, which
is none of the caller's. Sequence n begins at program

    bounds[n] // ROWS + n,

which leaves it enough programs for its rows, whatever the bounds are. A program finds its chunk by
a binary search over this, and a few programs find no rows. The CPU knows the number of programs
from shapes alone.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def packed_bounds(cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """`cu_seqlens` as int64 on the device; None if every batch row is a sequence."""
    return None if cu_seqlens is None else cu_seqlens.to(device=device, dtype=torch.int64)


def programs(batch: int, length: int, bounds: Tensor | None, ROWS: int) -> int:
    """An upper bound on the number of chunks of at most ROWS rows."""
    if bounds is None:
        return batch * -(-length // ROWS)
    return length // ROWS + len(bounds)


@triton.jit
def chunk_of(program, bounds, N, length, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """(n, start, end, first) of a program, int64: its sequence n is rows [start, end), its chunk is
    rows [first, min(first + ROWS, end)), which may be empty."""
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
    """(start, end) of sequence n, int64: its rows are [start, end)."""
    if PACKED:
        return tl.load(bounds + n), tl.load(bounds + n + 1)
    else:
        return n.to(tl.int64) * length, n.to(tl.int64) * length + length


@triton.jit
def load_rows(x, first, shift, lowest, end, c, D, ROWS: tl.constexpr):
    """(ROWS, channels c) fp32: rows from first + shift of x (rows, D), zeros outside [lowest, end).

    The address is a 64-bit scalar plus a tile of 32-bit offsets, which take half the registers.
    """
    row = tl.arange(0, ROWS) + shift
    kept = (row >= (lowest - first).to(tl.int32)) & (row < (end - first).to(tl.int32))
    place = x + first * D + (row[:, None] * D + c[None, :])
    return tl.load(place, mask=kept[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, first, lowest, end, c, D, ROWS: tl.constexpr):
    """Write the tile that `load_rows` would read with shift 0."""
    row = tl.arange(0, ROWS)
    kept = (row >= (lowest - first).to(tl.int32)) & (row < (end - first).to(tl.int32))
    place = x + first * D + (row[:, None] * D + c[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=kept[:, None] & (c < D)[None, :])
