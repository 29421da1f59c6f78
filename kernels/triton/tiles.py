"""What the kernels of the recurrence share: loads, gates and products of one chunk's tiles.

A chunk is CHUNK rows (tokens) of one sequence, or fewer at its end. Tokens of all batch rows lie
end to end, and arrays are (tokens, heads, width). A row past the chunk's end is loaded as zero. A
zero key writes nothing and a zero decay changes nothing, so short chunks need no special case.

A *gate* g is the log decay cumulated over the rows of a chunk.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)  # C in the comments of this room

# Kinds of decay: none, one number a token and head, or a vector (Dk,) a token and head.
NONE = tl.constexpr(0)
SCALAR = tl.constexpr(1)
VECTOR = tl.constexpr(2)

# Log decays below this count as this: e^-40 of a state is far below the fp32 round-off of what is
# added to it. So cumulated sums stay small, and so does their round-off, which would otherwise be
# that of a huge decay for all rows of its chunk; and −∞ is a valid input.
FORGET_ALL = tl.constexpr(-40.0)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operand(a, PRECISION: tl.constexpr):
    """a in the dtype in which products take it: bf16 or fp32."""
    if PRECISION == "bf16":
        return a.to(tl.bfloat16)
    else:
        return a.to(tl.float32)


@triton.jit
def for_sums(a, PRECISION: tl.constexpr):
    """a in the dtype in which log decays and their gradients are summed: fp32, but fp64 if products
    are fp32.

    Differences of neighbouring sums are used, which are far smaller than the sums and have their
    round-off. With fp32 products that would be the largest error; bf16 and tf32 ones have more.
    """
    if PRECISION == "ieee":
        return a.to(tl.float64)
    else:
        return a.to(tl.float32)


@triton.jit
def exp(log):
    """e^log in fp32, for differences of sums in the dtype of `for_sums`."""
    return tl.exp(log.to(tl.float32))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a · b, summed in fp32. PRECISION is "bf16", or the input precision of fp32 operands."""
    a, b = operand(a, PRECISION), operand(b, PRECISION)
    if PRECISION != "bf16":
        if b.shape[1] < a.shape[0]:
            return tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision=PRECISION))
        else:
            return tl.dot(a, b, input_precision=PRECISION)
    elif INTERPRETED:
        # The interpreter multiplies bf16 wrongly (it takes the bits for numbers). In fp32 products
        # of two bf16 are exact.
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def at(pointer, start, heads, head, width):
    """Address of row `start` of one head in a (tokens, heads, width) array.

    This part of an address has 64 bits. Offsets inside a chunk have 32: half the registers.
    """
    return pointer + (start.to(tl.int64) * heads + head) * width


@triton.jit
def within(indices, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """indices < WIDTH; a constant for the compiler if BLOCK divides WIDTH."""
    if WIDTH % BLOCK == 0:
        return indices >= 0
    else:
        return indices < WIDTH


@triton.jit
def load_rows(
    pointer, start, length, heads, head, WIDTH: tl.constexpr, column, COLUMNS: tl.constexpr
):
    """(tokens, heads, WIDTH) -> (CHUNK, COLUMNS) of one head, from row `start` and `column`; zeros
    past the chunk's `length` and the WIDTH."""
    rows = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < length)[:, None] & within(columns, WIDTH, COLUMNS)[None, :]
    offsets = (rows * (heads * WIDTH))[:, None] + columns[None, :]
    return tl.load(at(pointer, start, heads, head, WIDTH) + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer, tile, start, length, heads, head, WIDTH: tl.constexpr, column, COLUMNS: tl.constexpr
):
    """Write the tile that `load_rows` reads, in the dtype of the array."""
    rows = tl.arange(0, CHUNK)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < length)[:, None] & within(columns, WIDTH, COLUMNS)[None, :]
    offsets = (rows * (heads * WIDTH))[:, None] + columns[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(at(pointer, start, heads, head, WIDTH) + offsets, tile, mask=mask)


@triton.jit
def load_scalars(pointer, start, length, heads, head):
    """(tokens, heads) -> (CHUNK,) of one head in fp32, zeros past the chunk's `length`."""
    rows = tl.arange(0, CHUNK)
    first = at(pointer, start, heads, head, 1)
    return tl.load(first + rows * heads, mask=rows < length, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(pointer, values, start, length, heads, head):
    """Write the values that `load_scalars` reads."""
    rows = tl.arange(0, CHUNK)
    tl.store(at(pointer, start, heads, head, 1) + rows * heads, values, mask=rows < length)


@triton.jit
def load_state(
    pointer, index, heads, head, DK: tl.constexpr, DV: tl.constexpr,
    row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(…, heads, DK, DV) -> (ROWS, COLUMNS) of entry `index` and one head, zeros outside."""
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
    """Write the tile that `load_state` reads, in the dtype of the array."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = within(rows, DK, ROWS)[:, None] & within(columns, DV, COLUMNS)[None, :]
    offsets = rows[:, None] * DV + columns[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(at(pointer, index, heads, head, DK * DV) + offsets, tile, mask=mask)


@triton.jit
def last_row(gate):
    """The last row of a gate, (CHUNK, …) -> (…): taken from it, not summed again.

    Another order of summing would differ by its round-off, and `last − gate` of late rows is much
    smaller than either sum.
    """
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
    """The gate g of a chunk, and its last row; constant past the chunk's end.

    Row i reads e^{g_i} S_in: g_i includes the decay of row i itself. (CHUNK,) and (); with a vector
    decay (CHUNK, COLUMNS) and (COLUMNS,).
    """
    if KIND == NONE:
        gate = tl.zeros((CHUNK,), tl.float32)
        last = 0.0
    else:
        if KIND == VECTOR:
            steps = load_rows(decay, start, length, heads, head, DK, column, COLUMNS)
        else:
            steps = load_scalars(decay, start, length, heads, head)
        gate = tl.cumsum(for_sums(tl.maximum(steps.to(tl.float32), FORGET_ALL), PRECISION), axis=0)
        last = last_row(gate)
    return gate, last


@triton.jit
def load_row_gate(
    decay, start, length, slot, heads, head,
    DK: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(g, g_C − g, g_C) for `read_state`, `write_state` and `decayed_state`.

    A vector decay is in the rows already, multiplied in by `intra_chunk`: then only g_C is loaded,
    from `decay` (slots, heads, DK), which `intra_chunk` made.
    """
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
    """e^log ⊙ tile, for a tile (CHUNK, width) and log (CHUNK,) or (CHUNK, width)."""
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
    """(e^log ⊙ rows) · state: (CHUNK, Dk) · (Dk, Dv) -> (CHUNK, Dv).

    A factor a row is applied after the product. A vector decay cannot be: it is in the rows
    already, multiplied in by `intra_chunk`, which takes its exponentials once.
    """
    product = dot(rows, state, PRECISION)
    if KIND == SCALAR:
        product *= exp(log)[:, None]
    return product


@triton.jit
def write_state(rows, log, values, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """(e^log ⊙ rows)ᵀ · values: (Dk, CHUNK) · (CHUNK, Dv) -> (Dk, Dv)."""
    if KIND == SCALAR:
        values = values * exp(log)[:, None]
    return dot(tl.trans(rows), values, PRECISION)


@triton.jit
def to_last(gate, last, KIND: tl.constexpr):
    """Log decay from each row to the end of its chunk, g_C − g ≤ 0."""
    if KIND == VECTOR:
        return last[None, :] - gate
    else:
        return last - gate


@triton.jit
def pair_decay(gate):
    """(CHUNK, CHUNK): e^{g_i − g_j} for j ≤ i, else 0. Masked before the exponential, which could
    overflow."""
    rows = tl.arange(0, CHUNK)
    causal = rows[:, None] >= rows[None, :]
    log = tl.where(causal, gate[:, None] - gate[None, :], 0.0)
    return tl.where(causal, exp(log), 0.0)
