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

# What `decay` is: absent, one number a token and head, or a vector for each.
NONE = tl.constexpr(0)
SCALAR = tl.constexpr(1)
VECTOR = tl.constexpr(2)

# The least log decay of one step that is told from total: e^-40 of a state is far below the fp32
# round-off of what it is added to. Clamped, cumulative sums stay small, and with them their
# round-off, which the neighbours of a saturated gate would pay for; and -inf is an input like any.
FORGET_ALL = tl.constexpr(-40.0)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operand(a, PRECISION: tl.constexpr):
    """a as products take it: rounded to bf16, or in fp32."""
    if PRECISION == "bf16":
        return a.to(tl.bfloat16)
    else:
        return a.to(tl.float32)


@triton.jit
def fine(a, PRECISION: tl.constexpr):
    """a as log decays and their gradients are summed: in fp32, or beside fp32 products in fp64.

    Neighbours' sums differ by far less than they come to, and the difference has the round-off
    of the sums: more than that of everything else, unless the products are rounded more.
    """
    if PRECISION == "ieee":
        return a.to(tl.float64)
    else:
        return a.to(tl.float32)


@triton.jit
def exp(log):
    """e^log in fp32, for a difference of sums that `fine` made."""
    return tl.exp(log.to(tl.float32))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a · b, summed in fp32; PRECISION is "bf16" or an input precision for fp32 operands."""
    a, b = operand(a, PRECISION), operand(b, PRECISION)
    if PRECISION != "bf16":
        if b.shape[1] < a.shape[0]:
            return tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision=PRECISION))
        else:
            return tl.dot(a, b, input_precision=PRECISION)
    elif INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16. Products of bf16 are exact in fp32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def at(pointer, start, heads, head, width):
    """Where row `start` of one head begins in a (tokens, heads, width) array.

    This is the 64-bit part of an address: the offsets inside a chunk fit 32 bits, which halves
    the registers that they take.
    """
    return pointer + (start.to(tl.int64) * heads + head) * width


@triton.jit
def within(indices, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """indices < WIDTH, known to the compiler where blocks of that size fill the width."""
    if WIDTH % BLOCK == 0:
        return indices >= 0
    else:
        return indices < WIDTH


@triton.jit
def load_rows(
    pointer, start, length, heads, head, WIDTH: tl.constexpr, column, COLUMNS: tl.constexpr
):
    """(CHUNK, COLUMNS) of a (tokens, heads, WIDTH) array, zero outside."""
    rows = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < length)[:, None] & within(columns, WIDTH, COLUMNS)[None, :]
    offsets = (rows * (heads * WIDTH))[:, None] + columns[None, :]
    return tl.load(at(pointer, start, heads, head, WIDTH) + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer, tile, start, length, heads, head, WIDTH: tl.constexpr, column, COLUMNS: tl.constexpr
):
    """The opposite of `load_rows`, in the dtype of the array."""
    rows = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < length)[:, None] & within(columns, WIDTH, COLUMNS)[None, :]
    offsets = (rows * (heads * WIDTH))[:, None] + columns[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(at(pointer, start, heads, head, WIDTH) + offsets, tile, mask=mask)


@triton.jit
def load_scalars(pointer, start, length, heads, head):
    """(CHUNK,) of a (tokens, heads) array in fp32, zero outside."""
    rows = tl.arange(0, CHUNK)
    first = at(pointer, start, heads, head, 1)
    return tl.load(first + rows * heads, mask=rows < length, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(pointer, values, start, length, heads, head):
    """The opposite of `load_scalars`."""
    rows = tl.arange(0, CHUNK)
    tl.store(at(pointer, start, heads, head, 1) + rows * heads, values, mask=rows < length)


@triton.jit
def load_state(
    pointer, index, heads, head, DK: tl.constexpr, DV: tl.constexpr,
    row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) of entry `index` of (…, heads, DK, DV), zero outside."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = within(rows, DK, ROWS)[:, None] & within(columns, DV, COLUMNS)[None, :]
    offsets = rows[:, None] * DV + columns[None, :]
    return tl.load(at(pointer, index, heads, head, DK * DV) + offsets, mask=mask, other=0.0)


@triton.jit
def store_state(
    pointer, tile, index, heads, head, DK: tl.constexpr, DV: tl.constexpr,
    row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The opposite of `load_state`, in the dtype of the array."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = within(rows, DK, ROWS)[:, None] & within(columns, DV, COLUMNS)[None, :]
    offsets = rows[:, None] * DV + columns[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(at(pointer, index, heads, head, DK * DV) + offsets, tile, mask=mask)


@triton.jit
def last_row(gate):
    """The very sum that the last row of a gate has: another order of summing would differ by its
    round-off, and `last − gate` of the last rows is much smaller than either."""
    rows = tl.arange(0, CHUNK)
    if len(gate.shape) == 1:
        return tl.sum(tl.where(rows == CHUNK - 1, gate, 0.0))
    else:
        return tl.sum(tl.where((rows == CHUNK - 1)[:, None], gate, 0.0), axis=0)


@triton.jit
def load_gate(
    decay, start, length, heads, head,
    DK: tl.constexpr, column, COLUMNS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cumulative log decay g of a chunk's rows, flat past the chunk's end, and at its last row.

    g_i multiplied the state that row i reads, its own step included: e^{g_i} S_in. (CHUNK,) and
    a number; for a vector decay (CHUNK, COLUMNS) and (COLUMNS,).
    """
    if KIND == NONE:
        gate = tl.zeros((CHUNK,), tl.float32)
        last = 0.0
    else:
        if KIND == VECTOR:
            steps = load_rows(decay, start, length, heads, head, DK, column, COLUMNS)
        else:
            steps = load_scalars(decay, start, length, heads, head)
        gate = tl.cumsum(fine(tl.maximum(steps.to(tl.float32), FORGET_ALL), PRECISION), axis=0)
        last = last_row(gate)
    return gate, last


@triton.jit
def load_row_gate(
    decay, start, length, slot, heads, head,
    DK: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gate of each row, from each row to the last, and of the last, for `read_state` and
    `write_state`. Rows come with a vector decay multiplied in, and only the last is left: `decay`
    is then what `intra_chunk` made, (slots, heads, DK)."""
    if KIND == VECTOR:
        gate = tl.zeros((CHUNK,), tl.float32)
        rest = gate
        columns = tl.arange(0, COLUMNS)
        place = at(decay, slot, heads, head, DK) + columns
        last = tl.load(place, mask=within(columns, DK, COLUMNS), other=0.0)
    else:
        gate, last = load_gate(decay, start, length, heads, head, DK, 0, COLUMNS, KIND, PRECISION)
        rest = last - gate
    return gate, rest, last


@triton.jit
def decayed(tile, log, KIND: tl.constexpr):
    """e^log ⊙ tile, for a gate of (CHUNK,) or (CHUNK, width)."""
    if KIND == NONE:
        return tile
    elif KIND == VECTOR:
        return tile * exp(log)
    else:
        return tile * exp(log)[:, None]


@triton.jit
def decayed_state(state, last, KIND: tl.constexpr):
    """Diag(e^last) · state."""
    if KIND == NONE:
        return state
    elif KIND == VECTOR:
        return state * exp(last)[:, None]
    else:
        return state * exp(last)


@triton.jit
def read_state(rows, log, state, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """(e^log ⊙ rows) · state: (CHUNK, Dk) by (Dk, Dv).

    A factor a row commutes with the product. One for each number of a row does not: a vector
    decay has been multiplied into the rows by `intra_chunk`, its exponentials taken once.
    """
    product = dot(rows, state, PRECISION)
    if KIND == SCALAR:
        product *= exp(log)[:, None]
    return product


@triton.jit
def write_state(rows, log, values, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """(e^log ⊙ rows)ᵀ · values: (Dk, CHUNK) by (CHUNK, Dv)."""
    if KIND == SCALAR:
        values = values * exp(log)[:, None]
    return dot(tl.trans(rows), values, PRECISION)


@triton.jit
def to_last(gate, last, KIND: tl.constexpr):
    """Log decay from a row to the end of its chunk, never positive."""
    if KIND == VECTOR:
        return last[None, :] - gate
    else:
        return last - gate


@triton.jit
def pair_decay(gate):
    """e^{g_i − g_j} for j ≤ i and zero elsewhere, masked before the exponential."""
    rows = tl.arange(0, CHUNK)
    causal = rows[:, None] >= rows[None, :]
    log = tl.where(causal, gate[:, None] - gate[None, :], 0.0)
    return tl.where(causal, exp(log), 0.0)
