"""What the kernels of the recurrence share: loads, gates and products of one chunk's tiles.

A chunk is CHUNK rows (tokens) of one sequence, or fewer at its end. Tokens of all batch rows
lie end to end and arrays are (tokens, heads, width). A row past the chunk's end reads as zero:
a zero key writes nothing and a zero decay forgets nothing, so short chunks are no special case.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import os

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)

# What `decay` is: absent, one constant a head, one number a token and head, or a vector a token.
NONE = tl.constexpr(0)
HEAD = tl.constexpr(1)
SCALAR = tl.constexpr(2)
VECTOR = tl.constexpr(3)

# exp underflows to an fp32 zero here. The clamp loses nothing that could be represented, keeps
# cumulative sums small (their round-off is relative to their size), and admits −inf.
FORGET_ALL = tl.constexpr(-104.0)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a · b in fp32, operands rounded to bf16 ("bf16") or kept in fp32 (an input precision)."""
    if PRECISION == "bf16":
        # The interpreter multiplies the bit patterns of bf16 operands; their product is exact
        # in fp32, so there they are rounded the same way and multiplied as fp32.
        if INTERPRETED:
            return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32))
        else:
            return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def rounded(a, PRECISION: tl.constexpr):
    """a as `dot` will see it, in fp32."""
    if PRECISION == "bf16":
        return a.to(tl.bfloat16).to(tl.float32)
    else:
        return a


@triton.jit
def row_offsets(start, heads, head, width):
    """Offsets of a chunk's rows in a (tokens, heads, width) array, in 64 bits."""
    rows = start.to(tl.int64) + tl.arange(0, CHUNK)
    return (rows * heads + head) * width


@triton.jit
def load_rows(
    pointer, start, length, heads, head, WIDTH: tl.constexpr, column, COLUMNS: tl.constexpr
):
    """(CHUNK, COLUMNS) of a (tokens, heads, WIDTH) array, zero outside."""
    columns = column + tl.arange(0, COLUMNS)
    mask = (tl.arange(0, CHUNK) < length)[:, None] & (columns < WIDTH)[None, :]
    offsets = row_offsets(start, heads, head, WIDTH)[:, None] + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer, tile, start, length, heads, head, WIDTH: tl.constexpr, column, COLUMNS: tl.constexpr
):
    """The opposite of `load_rows`, in the dtype of the array."""
    columns = column + tl.arange(0, COLUMNS)
    mask = (tl.arange(0, CHUNK) < length)[:, None] & (columns < WIDTH)[None, :]
    offsets = row_offsets(start, heads, head, WIDTH)[:, None] + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_scalars(pointer, start, length, heads, head):
    """(CHUNK,) of a (tokens, heads) array in fp32, zero outside."""
    mask = tl.arange(0, CHUNK) < length
    offsets = row_offsets(start, heads, head, 1)
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def state_block(
    index, heads, head, DK: tl.constexpr, DV: tl.constexpr,
    row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a (ROWS, COLUMNS) block of entry `index` of (…, heads, DK, DV)."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    first = (index.to(tl.int64) * heads + head) * (DK * DV)
    mask = (rows < DK)[:, None] & (columns < DV)[None, :]
    return first + rows[:, None] * DV + columns[None, :], mask


@triton.jit
def load_gate(
    decay, start, length, heads, head,
    DK: tl.constexpr, column, COLUMNS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Cumulative log decay g of a chunk's rows, and its value at the last row.

    (CHUNK,) and a number, or (CHUNK, COLUMNS) and (COLUMNS,) for the vector kind, whose `decay`
    has been accumulated by `accumulate_gate`; flat past the chunk's end except there, where it
    is zero. g is what multiplied the state up to and including a row: e^{g_i} S_in.
    """
    if KIND == VECTOR:
        gate = load_rows(decay, start, length, heads, head, DK, column, COLUMNS)
        columns = column + tl.arange(0, COLUMNS)
        last_row = ((start.to(tl.int64) + length - 1) * heads + head) * DK
        last = tl.load(decay + last_row + columns, mask=columns < DK, other=0.0)
    elif KIND == NONE:
        gate = tl.zeros((CHUNK,), tl.float32)
        last = 0.0
    elif KIND == HEAD:
        step = tl.maximum(tl.load(decay + head).to(tl.float32), FORGET_ALL)
        gate = step * tl.minimum(tl.arange(0, CHUNK) + 1, length).to(tl.float32)
        last = step * length.to(tl.float32)
    else:
        steps = load_scalars(decay, start, length, heads, head)
        gate = tl.cumsum(tl.maximum(steps, FORGET_ALL), axis=0)
        # The very sum that the last row has: another order of summing would differ by its
        # round-off, and `last − gate` of the last rows is much smaller than either.
        last = tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, gate, 0.0))
    return gate, last


@triton.jit
def decayed(tile, log, KIND: tl.constexpr):
    """e^log ⊙ tile, for a gate of (CHUNK,) or (CHUNK, width)."""
    if KIND == NONE:
        return tile
    elif KIND == VECTOR:
        return tile * tl.exp(log)
    else:
        return tile * tl.exp(log)[:, None]


@triton.jit
def decayed_state(state, last, KIND: tl.constexpr):
    """Diag(e^last) · state."""
    if KIND == NONE:
        return state
    elif KIND == VECTOR:
        return state * tl.exp(last)[:, None]
    else:
        return state * tl.exp(last)


@triton.jit
def read_state(rows, log, state, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """(e^log ⊙ rows) · state: (CHUNK, Dk) by (Dk, Dv)."""
    if KIND == VECTOR:
        return dot(decayed(rows, log, KIND), state, PRECISION)
    else:
        # A factor a row commutes with the product, and leaves the operand as it was loaded.
        return decayed(dot(rows, state, PRECISION), log, KIND)


@triton.jit
def write_state(rows, log, values, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """(e^log ⊙ rows)ᵀ · values: (Dk, CHUNK) by (CHUNK, Dv)."""
    if KIND == VECTOR:
        return dot(tl.trans(decayed(rows, log, KIND)), values, PRECISION)
    else:
        return dot(tl.trans(rows), decayed(values, log, KIND), PRECISION)


@triton.jit
def to_last(gate, last, KIND: tl.constexpr):
    """Log decay from a row to the end of its chunk, never positive, zero past the end."""
    if KIND == VECTOR:
        # Rows past the end have a zero gate: `last` itself, not above zero either.
        return last[None, :] - gate
    else:
        return last - gate


@triton.jit
def pair_decay(gate):
    """e^{g_i − g_j} for j ≤ i and zero elsewhere, masked before the exponential."""
    rows = tl.arange(0, CHUNK)
    causal = rows[:, None] >= rows[None, :]
    log = tl.where(causal, gate[:, None] - gate[None, :], 0.0)
    return tl.where(causal, tl.exp(log), 0.0)
