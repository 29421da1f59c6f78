"""Inside one chunk: the weights of pairs of tokens, which depend on no state.

With g the gate (cumulated log decay) and i, j rows of the chunk, (C, C) each:

    A_ij = ⟨q_i, k_j e^{g_i − g_j}⟩           j ≤ i     weight of token j in output i
    K_ij = ⟨k_i, k_j e^{g_i − g_j}⟩           j < i     weight of token j in what key i erases
    Z    = K − K Diag(β) K + … = K (I + Diag(β) K)⁻¹    the delta rule, solved for the chunk

The delta rule's errors r = v − S_{t−1}ᵀk of a whole chunk then are r = R − Z(β R), where
R = V − (e^g ⊙ k) S_in; the values written are β r. The backward pass uses the same Z. β may be
zero, and the identity in (I + K Diag(β))⁻¹ = I − Z Diag(β) is never stored, so never rounded.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.tiles import (
    CHUNK,
    VECTOR,
    at,
    dot,
    exp,
    for_sums,
    load_gate,
    load_rows,
    load_scalars,
    pair_decay,
    store_rows,
    to_last,
    within,
)

# Pairs of rows share one product if the gate falls by at most this over the rows: then e^{±40}, and
# what it is multiplied with, are in the range of fp32 and of bf16. For fp32 products less, since a
# factor e^x has a relative error of x times the round-off.
FLAT = tl.constexpr(40.0)
FLAT_IN_FP32 = tl.constexpr(1.0)


@triton.jit
def first_level(gate, last, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """The level at which products over pairs begin: 5 (one product for the chunk) if the gate falls
    by at most FLAT over the chunk, 3 if it does over each block of 16 rows, else 0."""
    flat: tl.constexpr = FLAT_IN_FP32 if PRECISION == "ieee" else FLAT
    first = 5
    if tl.min(last) < -flat:
        blocks = tl.reshape(gate, (CHUNK // 16, 16, COLUMNS))
        fall = tl.max(tl.max(blocks, axis=1) - tl.min(blocks, axis=1))
        first = tl.where(fall <= flat, 3, 0)
    return first


@triton.jit
def pairs_at(level, first):
    """bool (CHUNK, CHUNK): the pairs (i, j), j < i, of the product of one level.

    A level has blocks of 2 · 2^level rows. At the first level these are all pairs inside a block,
    above it those with i in a block's second half and j in its first. Over levels first … 5 every
    pair j < i comes once.
    """
    rows = tl.arange(0, CHUNK)
    begin = (rows >> (level + 1)) << (level + 1)
    middle = begin + (1 << level)
    end = tl.where(level == first, rows, tl.where(rows < middle, begin, middle))
    return (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])


@triton.jit
def pair_factors(gate, level, COLUMNS: tl.constexpr):
    """(e^{g_i − g_m}, e^{g_m − g_j}), (CHUNK, COLUMNS) each: two factors of e^{g_i − g_j} for the
    pairs of a level, m being the middle row of the block.

    With i and j in different halves neither exceeds 1; inside a flat block neither exceeds e^FLAT.
    Factors that no pair uses are clamped to e^FLAT, so that they are finite.
    """
    rows = tl.arange(0, CHUNK)
    middle = ((rows >> level) | 1) << level
    reference = tl.gather(gate, tl.broadcast_to(middle[:, None], (CHUNK, COLUMNS)), axis=0)
    log = gate - reference
    return exp(tl.minimum(log, FLAT)), exp(tl.minimum(-log, FLAT))


@triton.jit
def blocks_of(K, SIZE: tl.constexpr, mask):
    """(CHUNK, CHUNK) -> (CHUNK / SIZE, SIZE, SIZE): of each row of SIZE × SIZE blocks of K the one
    that `mask` leaves."""
    COUNT: tl.constexpr = CHUNK // SIZE
    tiles = tl.reshape(tl.where(mask, K, 0.0), (COUNT, SIZE, COUNT, SIZE))
    return tl.sum(tiles, axis=2)


@triton.jit
def spread(blocks, SIZE: tl.constexpr):
    """(CHUNK / SIZE, SIZE, SIZE) -> (CHUNK, CHUNK): each block repeated along its row of blocks."""
    COUNT: tl.constexpr = CHUNK // SIZE
    tiles = tl.broadcast_to(blocks[:, :, None, :], (COUNT, SIZE, COUNT, SIZE))
    return tl.reshape(tiles, (CHUNK, CHUNK))


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a · b, for matrices in the dtype of `for_sums`, which is that of the result."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def solve(K, beta, PRECISION: tl.constexpr):
    """Z = K (I + Diag(β) K)⁻¹, (CHUNK, CHUNK), for a strictly lower triangular K.

    Forward substitution on the four diagonal blocks of 16 rows, all at once:
    z_i = K_i − Σ_{j<i} K_ij β_j z_j. Then the block below the diagonal of each pair of blocks,
    Z₂₁ = (I − Z₂₂ β₂) K₂₁ (I − β₁ Z₁₁), for blocks of 16 and then of 32.

    In fp32 by three tf32 products (PRECISION "tf32x3"), or in fp64 ("ieee"): with equal keys and
    β = 2 (a reflection each) Z is a sum of 64 terms ±2, which in fp32 beside fp32 products lost ten
    of its 24 bits. A shorter way, the series by repeated squaring of K, loses all digits if keys
    repeat.
    """
    K, beta = for_sums(K, PRECISION), for_sums(beta, PRECISION)
    SMALL: tl.constexpr = CHUNK // 4
    HALF: tl.constexpr = CHUNK // 2
    rows = tl.arange(0, CHUNK)
    block, half = rows // SMALL, rows // HALF
    same_block = block[:, None] == block[None, :]
    same_half = half[:, None] == half[None, :]
    corner = half[:, None] > half[None, :]
    between = same_half & (block[:, None] > block[None, :])
    K_own = blocks_of(K, SMALL, same_block)  # (4, 16, 16), on the diagonal
    K_pair = tl.reshape(blocks_of(K, SMALL, between), (2, 2, SMALL, SMALL))
    _, K_pair = tl.split(tl.permute(K_pair, (0, 2, 3, 1)))  # (2, 16, 16), below it in each half
    K_corner = tl.sum(blocks_of(K, HALF, corner), axis=0)  # (32, 32), second half by first half

    row = tl.arange(0, SMALL)
    b = tl.reshape(beta, (4, SMALL))
    z = K_own
    for i in range(2, SMALL):
        current = (row == i)[None, :, None]
        weights = tl.sum(tl.where(current, K_own, 0.0), axis=1) * b
        z -= tl.where(current, tl.sum(weights[:, :, None] * z, axis=1)[:, None, :], 0.0)

    # (4, 16, 16) -> two of (2, 16, 16): the first and the second block of each half
    z_1, z_2 = tl.split(tl.permute(tl.reshape(z, (2, 2, SMALL, SMALL)), (0, 2, 3, 1)))
    b_1, b_2 = tl.split(tl.permute(tl.reshape(beta, (2, 2, SMALL)), (0, 2, 1)))
    z_21 = K_pair - product(K_pair * b_1[:, None, :], z_1, PRECISION)
    z_21 -= product(z_2 * b_2[:, None, :], z_21, PRECISION)
    below = tl.broadcast_to(z_21[:, None, :, :], (2, 2, SMALL, SMALL))
    below = tl.reshape(below, (4, SMALL, SMALL))
    Z = tl.where(same_block, spread(z, SMALL), 0.0)
    Z = tl.where(between, spread(below, SMALL), Z)

    # (2, 32, 32) -> two of (32, 32): the diagonal blocks of the halves
    z_1, z_2 = tl.split(tl.permute(blocks_of(Z, HALF, same_half), (1, 2, 0)))
    b_1, b_2 = tl.split(tl.permute(tl.reshape(beta, (2, HALF)), (1, 0)))
    z_21 = K_corner - product(K_corner * b_1[None, :], z_1, PRECISION)
    z_21 -= product(z_2 * b_2[None, :], z_21, PRECISION)
    below = tl.broadcast_to(z_21[None, :, :], (2, HALF, HALF))
    return tl.where(corner, spread(below, HALF), Z).to(tl.float32)


@triton.jit
def intra_chunk(
    q, k, decay, beta, A, Z, q_read, k_read, k_written, lasts, chunks, key_heads, value_heads,
    DK: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """A and Z of one chunk and value head, written to (tokens, Hv, C) each. Grid: (slots, Hv).

    With a vector decay also q_read, k_read and k_written, (tokens, Hv, Dk): e^g ⊙ q, e^g ⊙ k and
    e^{g_C − g} ⊙ k, made once for all column blocks of the passes over a sequence; and `lasts`
    (slots, Hv, Dk): g_C. What is None is not made.

    Registers: one or two 64 × 64 sums, and a CHUNK × BLOCK_K strip of q, k and the gate.
    The weights e^{g_i − g_j} of a vector decay are inside the sum over Dk. They are split into
    factors of q and k (`pair_factors`): one tensor-core product for a flat chunk, up to six for a
    steep one, in place of an exponential for each pair and channel.
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
        if q is not None:
            q_strip = load_rows(q, start, length, key_heads, key_head, DK, column, BLOCK_K)
        if KIND == VECTOR:
            gate, last = load_gate(
                decay, start, length, value_heads, head, DK, column, BLOCK_K, KIND, PRECISION
            )
            columns = column + tl.arange(0, BLOCK_K)
            place = at(lasts, slot, value_heads, head, DK) + columns
            tl.store(place, last, mask=within(columns, DK, BLOCK_K))
            weighted = k_strip * exp(to_last(gate, last, KIND))
            store_rows(k_written, weighted, start, length, value_heads, head, DK, column, BLOCK_K)
            if k_read is not None:
                weighted = k_strip * exp(gate)
                store_rows(k_read, weighted, start, length, value_heads, head, DK, column, BLOCK_K)
            if q_read is not None:
                weighted = q_strip * exp(gate)
                store_rows(q_read, weighted, start, length, value_heads, head, DK, column, BLOCK_K)
            if A is not None or Z is not None:
                first = first_level(gate, last, BLOCK_K, PRECISION)
                for level in range(first, 6):
                    pairs = pairs_at(level, first)
                    reader, read = pair_factors(gate, level, BLOCK_K)
                    lower = tl.trans(k_strip * read)
                    if A is not None:
                        reads += tl.where(pairs, dot(q_strip * reader, lower, PRECISION), 0.0)
                    if Z is not None:
                        sees += tl.where(pairs, dot(k_strip * reader, lower, PRECISION), 0.0)
            if A is not None:
                own = tl.sum(q_strip.to(tl.float32) * k_strip.to(tl.float32), axis=1)
                reads += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
        else:
            if A is not None:
                reads += dot(q_strip, tl.trans(k_strip), PRECISION)
            if Z is not None:
                sees += dot(k_strip, tl.trans(k_strip), PRECISION)
    if KIND != VECTOR:
        gate, _ = load_gate(
            decay, start, length, value_heads, head, DK, 0, BLOCK_K, KIND, PRECISION
        )
        pair = pair_decay(gate)
        reads *= pair
        sees *= pair
    if A is not None:
        store_rows(A, reads, start, length, value_heads, head, CHUNK, 0, CHUNK)
    if Z is not None:
        strictly_lower = rows[:, None] > rows[None, :]
        b = load_scalars(beta, start, length, value_heads, head)
        solved = solve(tl.where(strictly_lower, sees, 0.0), b, SOLVE)
        store_rows(Z, solved, start, length, value_heads, head, CHUNK, 0, CHUNK)
