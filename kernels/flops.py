"""Floating-point operations of one forward pass of the ops that mix tokens.

A multiply-add counts as two. Neither masked pairs nor recomputation count, so a utilisation (MFU)
may be computed from these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK = 64  # tokens of a chunk in the Triton kernels


def linear_attention(
    lengths: Sequence[int] | np.ndarray, heads: int, key_dim: int, value_dim: int, delta: bool
) -> float:
    """FLOPs of `kernels.linear_attention` in chunks of `CHUNK`: linear in the tokens.

    For each token and head: reading and writing the state (2 · 2·Dk·Dv), and q kᵀ and A v with
    half a chunk of neighbours. The delta rule adds k kᵀ, two products with the triangular inverse,
    and one more read of the state.
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
    """FLOPs of causal `kernels.softmax_attention`: about Σ len²/2 pairs, fewer in a window."""
    n = np.asarray(lengths, dtype=np.float64)
    pairs = n * (n + 1) / 2
    if window is not None:
        beyond = np.maximum(n - window, 0)
        pairs -= beyond * (beyond + 1) / 2
    return float(pairs.sum()) * heads * 2 * (key_dim + value_dim)
