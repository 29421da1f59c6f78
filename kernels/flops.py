"""Work of the token-mixing ops, in floating-point operations of one forward pass.

A multiply-add counts as two. Work that masks throw away is not counted, nor is anything
that is recomputed: these are the numbers that a utilisation may be divided by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK = 64


def linear_attention(
    lengths: Sequence[int] | np.ndarray, heads: int, key_dim: int, value_dim: int, delta: bool
) -> float:
    """FLOPs of `kernels.linear_attention` in chunks of 64: linear in the tokens.

    A token and head reads and writes the state (2 · 2·Dk·Dv) and meets half a chunk of
    its neighbours in q kᵀ and A v. The delta rule adds k kᵀ, the two products with the
    triangular inverse and one more read of the state.
    """
    half_chunk = (CHUNK + 1) / 2
    a_token = 4 * key_dim * value_dim + 2 * half_chunk * (key_dim + value_dim)
    if delta:
        a_token += 2 * key_dim * value_dim + 2 * half_chunk * (2 * key_dim + value_dim)
    return float(sum(lengths)) * heads * a_token


def softmax_attention(
    lengths: Sequence[int] | np.ndarray,
    heads: int,
    key_dim: int,
    value_dim: int,
    window: int | None = None,
) -> float:
    """FLOPs of causal `kernels.softmax_attention`: half of Σ len², less under a window."""
    n = np.asarray(lengths, dtype=np.float64)
    pairs = n * (n + 1) / 2
    if window is not None:
        beyond = np.maximum(n - window, 0)
        pairs -= beyond * (beyond + 1) / 2
    return float(pairs.sum()) * heads * 2 * (key_dim + value_dim)
