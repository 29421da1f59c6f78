"""Inside one chunk: what its tokens read of each other, before any state is known.

With g the cumulative log decay and i, j rows of the chunk:

    A_ij = ⟨q_i, k_j e^{g_i − g_j}⟩           j ≤ i     what the output reads
    K_ij = ⟨k_i, k_j e^{g_i − g_j}⟩           j < i     what the delta rule sees
    Z    = K − K Diag(β) K + … = K (I + Diag(β) K)⁻¹    the delta rule, solved

so that the delta rule's errors r = v − S_{t−1}ᵀk of a whole chunk come from R = V − K_g S_in as
r = R − Z(β R), the values that are written are β r, and the same Z serves the backward pass.
β may be zero, and the identity in (I + K Diag(β))⁻¹ = I − Z Diag(β) is never rounded.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.tiles import (
    CHUNK,
    FORGET_ALL,
    VECTOR,
    dot,
    load_gate,
    load_rows,
    load_scalars,
    pair_decay,
    store_rows,
    to_last,
)


@triton.jit
def accumulate_gate(decay, gate, chunks, heads, DK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum a vector decay (tokens, heads, DK) inside each chunk, in fp32."""
    slot = tl.program_id(0)
    start = tl.load(chunks + slot * 2)
    length = tl.load(chunks + slot * 2 + 1).to(tl.int32)
    head = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_K
    steps = load_rows(decay, start, length, heads, head, DK, column, BLOCK_K).to(tl.float32)
    sums = tl.cumsum(tl.maximum(steps, FORGET_ALL), axis=0)
    store_rows(gate, sums, start, length, heads, head, DK, column, BLOCK_K)


@triton.jit
def halves(level):
    """Pairs (i, j) with i in the upper and j in the lower half of one block of 2·2^level rows.

    Over levels 0 … 5 these are all pairs j < i, each once. One comparison of a number a row with
    a number a column: a mask of more terms is kept in registers, one for each pair.
    """
    half = tl.arange(0, CHUNK) >> level
    upper = tl.where((half & 1) == 1, half, -1)
    return upper[:, None] == half[None, :] + 1


@triton.jit
def half_factor(gate, level, COLUMNS: tl.constexpr):
    """e^{g_i − g_m} for rows of an upper half, e^{g_m − g_j} for rows of a lower one, with m the
    first row of the upper half: e^{g_i − g_j} in two factors, neither exponent positive."""
    rows = tl.arange(0, CHUNK)
    middle = ((rows >> level) | 1) << level
    reference = tl.gather(gate, tl.broadcast_to(middle[:, None], (CHUNK, COLUMNS)), axis=0)
    return tl.exp(-tl.abs(gate - reference))


@triton.jit
def solve(K, beta, PRECISION: tl.constexpr):
    """Z = K (I + Diag(β) K)⁻¹ for a strictly lower K, in fp32.

    The two diagonal quadrants row after row, both at once: z_i = K_i − Σ_{j<i} K_ij β_j z_j.
    Then the one below the diagonal by two products: Z₂₁ = (I − Z₂₂ β₂) K₂₁ (I − β₁ Z₁₁).
    Doubling powers of K instead would be shorter, and loses all digits when keys repeat.
    """
    HALF: tl.constexpr = CHUNK // 2
    rows = tl.arange(0, CHUNK)
    row = tl.arange(0, HALF)
    lower = rows >= HALF
    diagonal = lower[:, None] == lower[None, :]
    corner = lower[:, None] & (rows < HALF)[None, :]
    quadrants = tl.reshape(tl.where(diagonal, K, 0.0), (2, HALF, 2, HALF))
    K_own = tl.sum(quadrants, axis=2)
    b = tl.reshape(beta, (2, HALF))
    z = K_own
    for i in range(2, HALF):
        current = (row == i)[None, :, None]
        weights = tl.sum(tl.where(current, K_own, 0.0), axis=1) * b
        z -= tl.where(current, tl.sum(weights[:, :, None] * z, axis=1)[:, None, :], 0.0)

    quadrants = tl.reshape(tl.where(corner, K, 0.0), (2, HALF, 2, HALF))
    K_21 = tl.sum(tl.sum(quadrants, axis=2), axis=0)
    z_1, z_2 = tl.split(tl.permute(z, (1, 2, 0)))
    b_1, b_2 = tl.split(tl.permute(b, (1, 0)))
    identity = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    z_21 = dot(K_21, identity - b_1[:, None] * z_1, PRECISION)
    z_21 = dot(identity - z_2 * b_2[None, :], z_21, PRECISION)

    own = tl.broadcast_to(z[:, :, None, :], (2, HALF, 2, HALF))
    below = tl.broadcast_to(z_21[None, :, None, :], (2, HALF, 2, HALF))
    Z = tl.where(diagonal, tl.reshape(own, (CHUNK, CHUNK)), 0.0)
    return tl.where(corner, tl.reshape(below, (CHUNK, CHUNK)), Z)


@triton.jit
def intra_chunk(
    q, k, decay, beta, A, Z, q_read, k_read, k_written, chunks, key_heads, value_heads,
    DK: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    OUTPUT: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """A and Z of one chunk and value head, both (tokens, value_heads, CHUNK).

    Registers: one or two 64 × 64 sums, and a CHUNK × BLOCK_K strip of q, k and the gate.
    A vector decay cannot leave the product over Dk. It is split as in `half_factor`: six
    products of tensor cores over halves of halves, instead of exponentials a pair.
    """
    slot = tl.program_id(0)
    start = tl.load(chunks + slot * 2)
    length = tl.load(chunks + slot * 2 + 1).to(tl.int32)
    if length == 0:
        return
    head = tl.program_id(1)
    key_head = head // (value_heads // key_heads)
    rows = tl.arange(0, CHUNK)
    reads = tl.zeros((CHUNK, CHUNK), tl.float32)
    sees = tl.zeros((CHUNK, CHUNK), tl.float32)
    for column in range(0, DK, BLOCK_K):
        k_strip = load_rows(k, start, length, key_heads, key_head, DK, column, BLOCK_K)
        if OUTPUT:
            q_strip = load_rows(q, start, length, key_heads, key_head, DK, column, BLOCK_K)
        if KIND == VECTOR:
            gate, last = load_gate(
                decay, start, length, value_heads, head, DK, column, BLOCK_K, KIND
            )
            weighted = k_strip * tl.exp(to_last(gate, last, KIND))
            store_rows(k_written, weighted, start, length, value_heads, head, DK, column, BLOCK_K)
            if DELTA:
                weighted = k_strip * tl.exp(gate)
                store_rows(k_read, weighted, start, length, value_heads, head, DK, column, BLOCK_K)
            if OUTPUT:
                weighted = q_strip * tl.exp(gate)
                store_rows(q_read, weighted, start, length, value_heads, head, DK, column, BLOCK_K)
            for level in range(6):
                pairs = halves(level)
                factor = half_factor(gate, level, BLOCK_K)
                lower = tl.trans(k_strip * factor)
                if OUTPUT:
                    reads += tl.where(pairs, dot(q_strip * factor, lower, PRECISION), 0.0)
                if DELTA:
                    sees += tl.where(pairs, dot(k_strip * factor, lower, PRECISION), 0.0)
            if OUTPUT:
                own = tl.sum(q_strip.to(tl.float32) * k_strip.to(tl.float32), axis=1)
                reads += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
        else:
            if OUTPUT:
                reads += dot(q_strip, tl.trans(k_strip), PRECISION)
            if DELTA:
                sees += dot(k_strip, tl.trans(k_strip), PRECISION)
    if KIND != VECTOR:
        gate, _ = load_gate(decay, start, length, value_heads, head, DK, 0, BLOCK_K, KIND)
        pair = pair_decay(gate)
        reads *= pair
        sees *= pair
    if OUTPUT:
        store_rows(A, reads, start, length, value_heads, head, CHUNK, 0, CHUNK)
    if DELTA:
        strictly_lower = rows[:, None] > rows[None, :]
        b = load_scalars(beta, start, length, value_heads, head)
        solved = solve(tl.where(strictly_lower, sees, 0.0), b, SOLVE)
        store_rows(Z, solved, start, length, value_heads, head, CHUNK, 0, CHUNK)
