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
    VECTOR,
    at,
    dot,
    exp,
    fine,
    load_gate,
    load_rows,
    load_scalars,
    pair_decay,
    store_rows,
    to_last,
    within,
)

# By how much a log decay may fall over rows whose pairs share one product: e^±40 and what it is
# multiplied with stay in the range of fp32 and bf16. Beside fp32 products less, since a factor has
# the round-off of its exponent.
FLAT = tl.constexpr(40.0)
FLAT_IN_FP32 = tl.constexpr(1.0)


@triton.jit
def first_level(gate, last, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """The level that products over pairs begin at: 5 if the gate falls by no more than FLAT over
    the chunk, 3 if it does so over each block of 16 rows, else 0."""
    flat: tl.constexpr = FLAT_IN_FP32 if PRECISION == "ieee" else FLAT
    first = 5
    if tl.min(last) < -flat:
        blocks = tl.reshape(gate, (CHUNK // 16, 16, COLUMNS))
        fall = tl.max(tl.max(blocks, axis=1) - tl.min(blocks, axis=1))
        first = tl.where(fall <= flat, 3, 0)
    return first


@triton.jit
def pairs_at(level, first):
    """Pairs (i, j), j < i, that one product serves: at the first level all of one block of
    2·2^level rows, above it those with i in the upper and j in the lower half of one.

    Over levels first … 5 these are all pairs j < i, each once.
    """
    rows = tl.arange(0, CHUNK)
    begin = (rows >> (level + 1)) << (level + 1)
    middle = begin + (1 << level)
    end = tl.where(level == first, rows, tl.where(rows < middle, begin, middle))
    return (rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None])


@triton.jit
def pair_factors(gate, level, COLUMNS: tl.constexpr):
    """e^{g_i − g_j} of those pairs in two factors, e^{g_i − g_m} and e^{g_m − g_j}, with m the
    middle row of the block. Neither is larger than 1 where i and j are in different halves, and
    than e^FLAT inside a flat block; what no pair has a use for is kept finite."""
    rows = tl.arange(0, CHUNK)
    middle = ((rows >> level) | 1) << level
    reference = tl.gather(gate, tl.broadcast_to(middle[:, None], (CHUNK, COLUMNS)), axis=0)
    log = gate - reference
    return exp(tl.minimum(log, FLAT)), exp(tl.minimum(-log, FLAT))


@triton.jit
def blocks_of(K, SIZE: tl.constexpr, mask):
    """SIZE × SIZE blocks of a 64 × 64 K, one in each row of blocks: those that `mask` leaves."""
    COUNT: tl.constexpr = CHUNK // SIZE
    tiles = tl.reshape(tl.where(mask, K, 0.0), (COUNT, SIZE, COUNT, SIZE))
    return tl.sum(tiles, axis=2)


@triton.jit
def spread(blocks, SIZE: tl.constexpr):
    """The opposite of `blocks_of`: (CHUNK, CHUNK) with each block all along its row of blocks."""
    COUNT: tl.constexpr = CHUNK // SIZE
    tiles = tl.broadcast_to(blocks[:, :, None, :], (COUNT, SIZE, COUNT, SIZE))
    return tl.reshape(tiles, (CHUNK, CHUNK))


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a · b of matrices that `fine` made."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def solve(K, beta, PRECISION: tl.constexpr):
    """Z = K (I + Diag(β) K)⁻¹ for a strictly lower K, in fp32, or beside fp32 products in fp64:
    equal keys with β = 2 reflect and reflect back, and the sums of 64 terms ±2 that Z then is lost
    ten of its 24 bits.

    The four diagonal blocks of 16 row after row, all at once: z_i = K_i − Σ_{j<i} K_ij β_j z_j.
    Then what is below the diagonal of a pair of blocks, Z₂₁ = (I − Z₂₂ β₂) K₂₁ (I − β₁ Z₁₁), for
    blocks of 16 and of 32. Doubling powers of K instead would be shorter, and loses all digits
    when keys repeat.
    """
    K, beta = fine(K, PRECISION), fine(beta, PRECISION)
    SMALL: tl.constexpr = CHUNK // 4
    HALF: tl.constexpr = CHUNK // 2
    rows = tl.arange(0, CHUNK)
    block, half = rows // SMALL, rows // HALF
    same_block = block[:, None] == block[None, :]
    same_half = half[:, None] == half[None, :]
    corner = half[:, None] > half[None, :]
    between = same_half & (block[:, None] > block[None, :])
    K_own = blocks_of(K, SMALL, same_block)
    K_pair = tl.reshape(blocks_of(K, SMALL, between), (2, 2, SMALL, SMALL))
    _, K_pair = tl.split(tl.permute(K_pair, (0, 2, 3, 1)))
    K_corner = tl.sum(blocks_of(K, HALF, corner), axis=0)

    row = tl.arange(0, SMALL)
    b = tl.reshape(beta, (4, SMALL))
    z = K_own
    for i in range(2, SMALL):
        current = (row == i)[None, :, None]
        weights = tl.sum(tl.where(current, K_own, 0.0), axis=1) * b
        z -= tl.where(current, tl.sum(weights[:, :, None] * z, axis=1)[:, None, :], 0.0)

    z_1, z_2 = tl.split(tl.permute(tl.reshape(z, (2, 2, SMALL, SMALL)), (0, 2, 3, 1)))
    b_1, b_2 = tl.split(tl.permute(tl.reshape(beta, (2, 2, SMALL)), (0, 2, 1)))
    z_21 = K_pair - product(K_pair * b_1[:, None, :], z_1, PRECISION)
    z_21 -= product(z_2 * b_2[:, None, :], z_21, PRECISION)
    below = tl.broadcast_to(z_21[:, None, :, :], (2, 2, SMALL, SMALL))
    below = tl.reshape(below, (4, SMALL, SMALL))
    Z = tl.where(same_block, spread(z, SMALL), 0.0)
    Z = tl.where(between, spread(below, SMALL), Z)

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
    """A and Z of one chunk and value head, both (tokens, value_heads, CHUNK).

    Of these and of what a vector decay is multiplied into, what is None is not made.

    Registers: one or two 64 × 64 sums, and a CHUNK × BLOCK_K strip of q, k and the gate.
    A vector decay cannot leave the product over Dk. It is split as in `pair_factors`: one product
    of tensor cores for a flat chunk, up to six over halves of halves for a steep one, instead of
    exponentials a pair. It is also multiplied into q and k here, once for all column blocks of the
    passes over a sequence.
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
