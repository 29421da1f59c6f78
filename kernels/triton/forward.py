"""The forward pass over a sequence: the state passes from chunk to chunk in registers.

For one sequence, value head and BLOCK_V columns of the state S (Dk × Dv, fp32), with A and Z of
`intra.py`, g the cumulative log decay of the chunk and g_C its last row:

    r = R − Z(β R),  R = v − (e^g ⊙ k) S      errors of the delta rule      (r = v without it)
    o = scale · [(e^g ⊙ q) S + A (β r)]       outputs                       (β = 1 without it)
    S ← Diag(e^{g_C}) S + (e^{g_C − g} ⊙ k)ᵀ (β r)

Outputs are computed here, where the state that they read is, so that the forward pass writes
neither the states (Dk·Dv / 64 numbers a token) nor β r to memory. The backward pass runs the same
kernel without o, and with buffers for the state that enters each chunk and for r.

The state may be wider than v: to columns past v's nothing is written. Those that begin as the
identity become the map of a state that enters later, and their outputs what it adds to o.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.tiles import (
    CHUNK,
    VECTOR,
    at,
    decayed_state,
    dot,
    load_row_gate,
    load_rows,
    load_scalars,
    load_state,
    read_state,
    store_rows,
    store_state,
    write_state,
)


@triton.jit
def load_values(
    v, start, length, heads, head,
    VALUES: tl.constexpr, DV: tl.constexpr, column, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(CHUNK, COLUMNS) of v in fp32; zeros in columns of the state past those of v."""
    if VALUES == DV:
        values = load_rows(v, start, length, heads, head, VALUES, column, COLUMNS)
    else:
        rows = tl.arange(0, CHUNK)
        columns = column + tl.arange(0, COLUMNS)
        mask = (rows < length)[:, None] & (columns < VALUES)[None, :]
        offsets = (rows * (heads * VALUES))[:, None] + columns[None, :]
        values = tl.load(at(v, start, heads, head, VALUES) + offsets, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def forward_chunks(
    q_read, k_read, k_written, v, decay, beta, A, Z, initial_state,
    o, final_state, states, errors, bounds, first_chunks, key_heads, value_heads, scale,
    DK: tl.constexpr, DV: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence and value head, for BLOCK_V columns of S. BLOCK_K ≥ Dk.

    Shapes as in `kernels.triton.linear_attention`: q_read, k_read, k_written (tokens, Hk or Hv,
    Dk); v (tokens, Hv, VALUES); o, errors (tokens, Hv, Dv); A, Z (tokens, Hv, C); states (slots,
    Hv, Dk, Dv), Dv ≥ VALUES. What is None is not read, or not written. Grid: (column blocks, Hv,
    N).
    """
    column = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    key_head = head // (value_heads // key_heads)
    begin = tl.load(bounds + sequence)
    end = tl.load(bounds + sequence + 1)
    first_chunk = tl.load(first_chunks + sequence)

    if initial_state is not None:
        S = load_state(
            initial_state, sequence, value_heads, head, DK, DV, 0, BLOCK_K, column, BLOCK_V
        )
    else:
        S = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)

    for chunk in range(0, tl.cdiv(end - begin, CHUNK)):
        start = begin + chunk * CHUNK
        length = tl.minimum(end - start, CHUNK).to(tl.int32)
        slot = first_chunk + chunk
        gate, rest, last = load_row_gate(
            decay, start, length, slot, value_heads, head, DK, BLOCK_K, KIND, PRECISION
        )
        if states is not None:
            store_state(states, S, slot, value_heads, head, DK, DV, 0, BLOCK_K, column, BLOCK_V)
        # All reads of the state come together, so that the registers of its operands are freed.
        r = load_values(v, start, length, value_heads, head, VALUES, DV, column, BLOCK_V)
        if beta is not None:
            k_tile = load_rows(k_read, start, length, key_heads, key_head, DK, 0, BLOCK_K)
            r -= read_state(k_tile, gate, S, KIND, PRECISION)
        if o is not None:
            q_tile = load_rows(q_read, start, length, key_heads, key_head, DK, 0, BLOCK_K)
            out = read_state(q_tile, gate, S, KIND, PRECISION)
        written = r
        if beta is not None:
            b = load_scalars(beta, start, length, value_heads, head)[:, None]
            Z_tile = load_rows(Z, start, length, value_heads, head, CHUNK, 0, CHUNK)
            r += dot(Z_tile, -b * r, PRECISION)
            written = b * r
        if states is not None:
            store_rows(errors, r, start, length, value_heads, head, DV, column, BLOCK_V)
        if o is not None:
            A_tile = load_rows(A, start, length, value_heads, head, CHUNK, 0, CHUNK)
            out += dot(A_tile, written, PRECISION)
            store_rows(o, out * scale, start, length, value_heads, head, DV, column, BLOCK_V)
        if KIND == VECTOR or beta is None:
            k_tile = load_rows(k_written, start, length, key_heads, key_head, DK, 0, BLOCK_K)
        S = decayed_state(S, last, KIND)
        S += write_state(k_tile, rest, written, KIND, PRECISION)

    store_state(final_state, S, sequence, value_heads, head, DK, DV, 0, BLOCK_K, column, BLOCK_V)
