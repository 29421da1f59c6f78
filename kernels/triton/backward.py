"""The backward pass: the state's gradient from the last chunk to the first, then all else at once.

With dS the gradient of the state that leaves a chunk, r the errors and β r the written values of
the forward pass, A and Z as in `intra.py`, g the gate:

    d(βr) = scale · Aᵀ do + (e^{g_C − g} ⊙ k) dS
    e     = d(βr) − Zᵀ(β d(βr)),  dv = β e,  dβ = ⟨r, e⟩     (dv = d(βr) without β)
    dS  ← Diag(e^{g_C}) dS + scale · (e^g ⊙ q)ᵀ do − (e^g ⊙ k)ᵀ dv

and then, each chunk by itself, with the state S that entered it:

    dA = scale · do (βr)ᵀ on j ≤ i,        dK = −dv (βr)ᵀ on j < i
    d(e^g ⊙ q) = scale · do Sᵀ,   d(e^g ⊙ k) = −dv Sᵀ,   d(e^{g_C − g} ⊙ k) = (βr) dSᵀ

The gradient of g is q ⊙ dq + k ⊙ dk of the rows as readers (e^g) minus k ⊙ dk of the rows as
written (e^−g), and that of g_C on its last row. The gradient of a row's decay is the sum of these
from the row to the end of its chunk.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.intra import first_level, pair_factors, pairs_at
from kernels.triton.tiles import (
    CHUNK,
    NONE,
    SCALAR,
    VECTOR,
    at,
    decayed,
    decayed_state,
    dot,
    exp,
    for_sums,
    load_gate,
    load_row_gate,
    load_rows,
    load_scalars,
    load_state,
    operand,
    pair_decay,
    read_state,
    store_rows,
    store_scalars,
    store_state,
    to_last,
    write_state,
)


@triton.jit(do_not_specialize=["tokens"])
def backward_chunks(
    q_read, k_read, k_written, decay, beta, A, Z, errors, d_o, d_final_state,
    d_v, d_beta, d_states, d_initial_state,
    bounds, first_chunks, key_heads, value_heads, tokens, scale,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one sequence and value head, the last first, for BLOCK_V columns of dS.

    Writes d_v (tokens, Hv, Dv); d_beta (column blocks, tokens, Hv), to be summed over column
    blocks; d_states (slots, Hv, Dk, Dv) and d_initial_state (N, Hv, Dk, Dv). Grid: (column blocks,
    Hv, N).
    """
    column = tl.program_id(0) * BLOCK_V
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    key_head = head // (value_heads // key_heads)
    begin = tl.load(bounds + sequence)
    end = tl.load(bounds + sequence + 1)
    first_chunk = tl.load(first_chunks + sequence)
    share = tl.program_id(0).to(tl.int64) * tokens * value_heads

    if d_final_state is not None:
        dS = load_state(
            d_final_state, sequence, value_heads, head, DK, DV, 0, BLOCK_K, column, BLOCK_V
        )
    else:
        dS = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)

    chunks = tl.cdiv(end - begin, CHUNK)
    for done in range(0, chunks):
        chunk = chunks - 1 - done
        start = begin + chunk * CHUNK
        length = tl.minimum(end - start, CHUNK).to(tl.int32)
        slot = first_chunk + chunk
        store_state(d_states, dS, slot, value_heads, head, DK, DV, 0, BLOCK_K, column, BLOCK_V)

        gate, rest, last = load_row_gate(
            decay, start, length, slot, value_heads, head, DK, BLOCK_K, KIND, PRECISION
        )
        k_tile = load_rows(k_written, start, length, key_heads, key_head, DK, 0, BLOCK_K)
        d_written = read_state(k_tile, rest, dS, KIND, PRECISION)
        dS = decayed_state(dS, last, KIND)
        if d_o is not None:
            q_tile = load_rows(q_read, start, length, key_heads, key_head, DK, 0, BLOCK_K)
            A_tile = load_rows(A, start, length, value_heads, head, CHUNK, 0, CHUNK)
            d_out = load_rows(d_o, start, length, value_heads, head, DV, column, BLOCK_V)
            d_out = d_out.to(tl.float32) * scale
            d_written += dot(tl.trans(A_tile), d_out, PRECISION)
            dS += write_state(q_tile, gate, d_out, KIND, PRECISION)
        if beta is not None:
            b = load_scalars(beta, start, length, value_heads, head)
            Z_tile = load_rows(Z, start, length, value_heads, head, CHUNK, 0, CHUNK)
            r = load_rows(errors, start, length, value_heads, head, DV, column, BLOCK_V)
            e = d_written + dot(tl.trans(Z_tile), -b[:, None] * d_written, PRECISION)
            d_b = tl.sum(r.to(tl.float32) * e, axis=1)
            store_scalars(d_beta + share, d_b, start, length, value_heads, head)
            d_written = b[:, None] * e
            if KIND == VECTOR:
                k_tile = load_rows(k_read, start, length, key_heads, key_head, DK, 0, BLOCK_K)
            dS += write_state(k_tile, gate, -d_written, KIND, PRECISION)
        store_rows(d_v, d_written, start, length, value_heads, head, DV, column, BLOCK_V)

    store_state(
        d_initial_state, dS, sequence, value_heads, head, DK, DV, 0, BLOCK_K, column, BLOCK_V
    )


@triton.jit
def load_written(
    errors, beta, start, length, heads, head,
    DV: tl.constexpr, column, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(CHUNK, COLUMNS): the values that a chunk writes, β r; r alone, which is v, without β."""
    written = load_rows(errors, start, length, heads, head, DV, column, COLUMNS)
    if beta is not None:
        written = written * load_scalars(beta, start, length, heads, head)[:, None]
    return written


@triton.jit
def pair_gradient(
    d_rows, sign, errors, beta, x, k, gate, dP, start, length,
    key_heads, key_head, value_heads, head, STRICT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dP, the gradient of P_ij = ⟨x_i, k_j e^{g_i − g_j}⟩: sign · d_rows (βr)ᵀ, times
    e^{g_i − g_j} unless the decay is a vector, zero for j > i and, if STRICT, for j = i.

    Returns:
        (CHUNK,), for each row i the gradient of its scalar decay through pairs: Σ dP_mj P_mj over
        j < i ≤ m. These terms are summed by themselves. As a difference of larger sums the result
        would have their round-off, which is too much if it is small.
    """
    rows = tl.arange(0, CHUNK)
    earlier = rows[:, None] > rows[None, :]
    d_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for column in range(0, DV, BLOCK_V):
        tile = load_rows(d_rows, start, length, value_heads, head, DV, column, BLOCK_V)
        written = load_written(errors, beta, start, length, value_heads, head, DV, column, BLOCK_V)
        d_pairs += dot(tile, tl.trans(written), PRECISION)
    # With KIND NONE the gate is zero, and `pair_decay` only a mask j ≤ i.
    d_pairs *= sign * pair_decay(gate)
    if STRICT:
        d_pairs = tl.where(earlier, d_pairs, 0.0)
    store_rows(dP, d_pairs, start, length, value_heads, head, CHUNK, 0, CHUNK)
    crossed = tl.zeros((CHUNK,), tl.float32)
    if KIND == SCALAR:
        P = tl.zeros((CHUNK, CHUNK), tl.float32)
        for column in range(0, DK, BLOCK_K):
            x_strip = load_rows(x, start, length, key_heads, key_head, DK, column, BLOCK_K)
            k_strip = load_rows(k, start, length, key_heads, key_head, DK, column, BLOCK_K)
            P += dot(x_strip, tl.trans(k_strip), PRECISION)
        later = tl.cumsum(tl.where(earlier, d_pairs * P, 0.0), axis=0, reverse=True)
        crossed = tl.sum(tl.where(earlier, later, 0.0), axis=1)
    return crossed


@triton.jit
def pair_gradients(
    q, k, decay, beta, errors, d_o, d_v, dA, dK, d_decay, chunks, key_heads, value_heads, scale,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA and dK (tokens, Hv, C) of one chunk and value head, and the part of a scalar decay's
    gradient that comes through them, (tokens, Hv). Grid: (slots, Hv).

    For a vector decay KIND is NONE here: `gradients` computes its part. A kernel of its own, since
    inside `gradients` it spilled registers on sm_80.
    """
    slot = tl.program_id(0)
    start = tl.load(chunks + slot * 2)
    length = tl.load(chunks + slot * 2 + 1).to(tl.int32)
    if length == 0:
        return
    head = tl.program_id(1)
    key_head = head // (value_heads // key_heads)
    gate, _ = load_gate(decay, start, length, value_heads, head, DK, 0, BLOCK_K, KIND, PRECISION)
    d_steps = tl.zeros((CHUNK,), tl.float32)
    if dA is not None:
        d_steps += pair_gradient(
            d_o, scale, errors, beta, q, k, gate, dA, start, length,
            key_heads, key_head, value_heads, head, False,
            DK, DV, BLOCK_K, BLOCK_V, KIND, PRECISION,
        )  # fmt: skip
    if dK is not None:
        d_steps += pair_gradient(
            d_v, -1.0, errors, beta, k, k, gate, dK, start, length,
            key_heads, key_head, value_heads, head, True,
            DK, DV, BLOCK_K, BLOCK_V, KIND, PRECISION,
        )  # fmt: skip
    if KIND == SCALAR:
        store_scalars(d_decay, d_steps, start, length, value_heads, head)


@triton.jit
def add_pair_gradients(
    dP, x, k, gate, last, dx, dk, d_gate,
    BLOCK_K: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients through P_ij = ⟨x_i, k_j e^{g_i − g_j}⟩ to dx, dk and, for a vector decay,
    d_gate, (CHUNK, BLOCK_K) each."""
    if KIND == VECTOR:
        first = first_level(gate, last, BLOCK_K, PRECISION)
        for level in range(first, 6):
            reader, read = pair_factors(gate, level, BLOCK_K)
            # Row i adds to the gate's gradient what row j subtracts; for rows before both, these
            # cancel only if they are computed from the same rounded operands.
            x_part = operand(x * reader, PRECISION)
            k_part = operand(k * read, PRECISION)
            d_pairs = tl.where(pairs_at(level, first), dP, 0.0)
            reads = dot(d_pairs, k_part, PRECISION)
            dx += reader * reads
            d_gate += for_sums(x_part, PRECISION) * for_sums(reads, PRECISION)
            read_by = dot(tl.trans(d_pairs), x_part, PRECISION)
            dk += read * read_by
            d_gate -= for_sums(k_part, PRECISION) * for_sums(read_by, PRECISION)
    else:
        dx += dot(dP, k, PRECISION)
        dk += dot(tl.trans(dP), x, PRECISION)
    return dx, dk, d_gate


@triton.jit(do_not_specialize=["tokens"])
def gradients(
    q, k, decay, beta, errors, states, dA, dK, d_o, d_v, d_states, d_q, d_k, d_decay, chunks,
    key_heads, value_heads, tokens, scale,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the decay's gradient of one chunk and value head, for BLOCK_K columns of keys.

    Writes d_q, d_k (tokens, Hv, Dk), to be summed over the value heads of a key head; d_decay
    (tokens, Hv, Dk), or for a scalar decay (column blocks, tokens, Hv), to be summed over column
    blocks. Grid: (slots, Hv, column blocks).

    Registers: three sums of CHUNK × BLOCK_K, and a block of both states or of a pair gradient.
    """
    slot = tl.program_id(0)
    start = tl.load(chunks + slot * 2)
    length = tl.load(chunks + slot * 2 + 1).to(tl.int32)
    if length == 0:
        return
    head = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_K
    key_head = head // (value_heads // key_heads)
    rows = tl.arange(0, CHUNK)

    dq = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dk_reader = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dk = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    kept = tl.zeros((BLOCK_K,), tl.float32)
    for value_column in range(0, DV, BLOCK_V):
        S = load_state(
            states, slot, value_heads, head, DK, DV, column, BLOCK_K, value_column, BLOCK_V
        )
        dS = load_state(
            d_states, slot, value_heads, head, DK, DV, column, BLOCK_K, value_column, BLOCK_V
        )
        kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
        written = load_written(
            errors, beta, start, length, value_heads, head, DV, value_column, BLOCK_V
        )
        dk += dot(written, tl.trans(dS), PRECISION)
        if d_o is not None:
            d_out = load_rows(d_o, start, length, value_heads, head, DV, value_column, BLOCK_V)
            dq += dot(d_out, tl.trans(S), PRECISION)
        if dK is not None:
            dv = load_rows(d_v, start, length, value_heads, head, DV, value_column, BLOCK_V)
            dk_reader -= dot(dv, tl.trans(S), PRECISION)

    k_tile = load_rows(k, start, length, key_heads, key_head, DK, column, BLOCK_K)
    gate, last = load_gate(
        decay, start, length, value_heads, head, DK, column, BLOCK_K, KIND, PRECISION
    )
    dk = decayed(dk, to_last(gate, last, KIND), KIND)
    dk_reader = decayed(dk_reader, gate, KIND)
    d_gate = for_sums(k_tile, PRECISION) * for_sums(dk_reader, PRECISION)
    if d_o is not None:
        q_tile = load_rows(q, start, length, key_heads, key_head, DK, column, BLOCK_K)
        dq = decayed(dq * scale, gate, KIND)
        d_gate += for_sums(q_tile, PRECISION) * for_sums(dq, PRECISION)
    if KIND == VECTOR:
        d_last = tl.sum(k_tile * dk, axis=0) + exp(last) * kept
        d_gate -= for_sums(k_tile, PRECISION) * for_sums(dk, PRECISION)
    elif KIND != NONE:
        # Beside pairs a row's decay is in three things: what this row and later ones read of the
        # entering state, what earlier rows write to the leaving state, and what the entering state
        # leaves in it.
        d_written = tl.sum(k_tile * dk, axis=1)[None, :]
        d_steps = tl.sum(tl.where(rows[:, None] > rows[None, :], d_written, 0.0), axis=1)
        d_steps += tl.cumsum(tl.sum(d_gate, axis=1), axis=0, reverse=True)
        d_steps += exp(last) * tl.sum(kept)
        share = tl.program_id(2).to(tl.int64) * tokens * value_heads
        store_scalars(d_decay + share, d_steps, start, length, value_heads, head)
    dk += dk_reader

    if d_o is not None:
        if KIND == VECTOR:
            # Pairs j = i have no decay, so they add to dq and dk only.
            diagonal = at(dA, start, value_heads, head, CHUNK) + rows * (value_heads * CHUNK + 1)
            own = tl.load(diagonal, mask=rows < length, other=0.0).to(tl.float32)[:, None]
            dq += own * k_tile
            dk += own * q_tile
        dA_tile = load_rows(dA, start, length, value_heads, head, CHUNK, 0, CHUNK)
        dq, dk, d_gate = add_pair_gradients(
            dA_tile, q_tile, k_tile, gate, last, dq, dk, d_gate, BLOCK_K, KIND, PRECISION
        )
        store_rows(d_q, dq, start, length, value_heads, head, DK, column, BLOCK_K)
    if dK is not None:
        dK_tile = load_rows(dK, start, length, value_heads, head, CHUNK, 0, CHUNK)
        d_reader = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        d_reader, dk, d_gate = add_pair_gradients(
            dK_tile, k_tile, k_tile, gate, last, d_reader, dk, d_gate, BLOCK_K, KIND, PRECISION
        )
        dk += d_reader
    store_rows(d_k, dk, start, length, value_heads, head, DK, column, BLOCK_K)
    if KIND == VECTOR:
        d_steps = tl.cumsum(d_gate, axis=0, reverse=True) + d_last[None, :]
        store_rows(d_decay, d_steps, start, length, value_heads, head, DK, column, BLOCK_K)
