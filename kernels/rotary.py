"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.packing import accumulation_dtype


def rotary_embedding(
    x: Tensor, positions: Tensor, *, theta: float = 10000.0, rotary_dim: int | None = None
) -> Tensor:
    """Turn pairs of channels by angles proportional to the token's position.

    Channels i and i + R/2 (i < R/2, R = `rotary_dim`: the half-split convention of NeoX and
    Llama) turn by position · theta^(−2i/R). Channels from R on pass unchanged.

    Args:
        x: (B, T, H, D), floating point.
        positions: (T,) or (B, T), int: each token's place in its own sequence.
        theta: base of the wavelengths.
        rotary_dim: R, even, at most D; D unless given.

    Returns:
        The shape and dtype of x. Angles are fp32 (fp64 for fp64 inputs); the backward
        keeps the positions alone.

    Raises:
        ValueError: shapes or arguments do not fit together.

    Source: Su et al. 2021 (arXiv 2104.09864).
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be (B, T, H, D) floating point; got {tuple(x.shape)} {x.dtype}")
    B, T, _, D = x.shape
    if positions.shape not in ((T,), (B, T)) or positions.is_floating_point():
        raise ValueError(
            f"positions must be ({T},) or ({B}, {T}) int beside x {tuple(x.shape)}; "
            f"got {tuple(positions.shape)} {positions.dtype}"
        )
    R = D if rotary_dim is None else rotary_dim
    if not 0 <= R <= D or R % 2:
        raise ValueError(f"rotary_dim is {R}; it must be even and between 0 and the head_dim, {D}")
    return _Rotary.apply(x, positions, theta, R)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, theta: float, R: int) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.theta, ctx.rotary_dim = theta, R
        return _rotate(x, positions, theta, R, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        # A rotation's transpose is the rotation back.
        return _rotate(dy, positions, ctx.theta, ctx.rotary_dim, -1), None, None, None


def _rotate(x: Tensor, positions: Tensor, theta: float, R: int, sign: int) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    # Exponents in fp64: fp32 rounding of theta^(−2i/R) grows with the position to a
    # visible angle at long contexts.
    exponents = torch.arange(0, R, 2, dtype=torch.float64, device=x.device) / max(R, 1)
    frequencies = (theta**-exponents).to(dtype)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    cos = angles.cos().unsqueeze(-2)  # (T, 1, R / 2) or (B, T, 1, R / 2)
    sin = angles.sin().mul_(sign).unsqueeze(-2)
    y = torch.empty_like(x)
    first, second = x[..., : R // 2].to(dtype), x[..., R // 2 : R].to(dtype)
    y[..., : R // 2] = (first * cos).addcmul_(second, sin, value=-1)
    y[..., R // 2 : R] = (first * sin).addcmul_(second, cos)
    y[..., R:] = x[..., R:]
    return y
