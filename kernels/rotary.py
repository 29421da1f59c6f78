"""Rotary position embedding."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.packing import accumulation_dtype


def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate pairs of channels by angles proportional to the token's position.

    Channels i and i + R/2 (i < R/2, R = `rotary_dim`: the half-split convention of NeoX and
    Llama) are rotated by position · theta^(−2i/R). Channels from R on are unchanged.

    Args:
        x: (B, T, H, D), floating point.
        positions: (T,) or (B, T), int: each token's place in its own sequence.
        theta: base of the wavelengths.
        rotary_dim: R, even, at most D; D unless given.
        backend: "triton" (GPU), "torch" (any device), or "auto".

    Returns:
        The shape and dtype of x. Angles are reduced modulo one turn in fp64 before they are rounded
        to fp32, so that far positions are as exact as near ones; products are fp32 (fp64 for
        fp64 inputs). The backward keeps the positions alone.

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
    return _Rotary.apply(x, positions, theta, R, R > 0 and use_triton(backend, x))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor, theta: float, R: int, triton: bool
    ) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.arguments = theta, R, triton
        return _rotated(x, positions, 1, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        # The transpose of a rotation is the rotation by the opposite angle.
        return _rotated(dy, positions, -1, *ctx.arguments), *[None] * 4


@lru_cache(maxsize=64)
def _frequencies(theta: float, R: int, device: torch.device) -> Tensor:
    """Turns for each position, θ^(−2i/R) / 2π: (R / 2,) fp64."""
    exponents = torch.arange(0, R, 2, dtype=torch.float64, device=device) / max(R, 1)
    return theta**-exponents / (2 * math.pi)


def _rotated(x: Tensor, positions: Tensor, sign: int, theta: float, R: int, triton: bool) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    frequencies = _frequencies(theta, R, x.device)
    if triton:
        from kernels.triton import rotary as compiled

        return compiled.rotated(x, positions, frequencies, sign)
    turns = positions.double().unsqueeze(-1) * frequencies  # (T,) or (B, T) -> (…, R / 2)
    angles = turns.sub_(turns.round()).mul_(2 * math.pi).to(dtype)
    cos = angles.cos().unsqueeze(-2)  # (…, R / 2) -> (…, 1, R / 2), over the heads
    sin = angles.sin().mul_(sign).unsqueeze(-2)
    y = torch.empty_like(x)
    first, second = x[..., : R // 2].to(dtype), x[..., R // 2 : R].to(dtype)
    y[..., : R // 2] = (first * cos).addcmul_(second, sin, value=-1)
    y[..., R // 2 : R] = (first * sin).addcmul_(second, cos)
    y[..., R:] = x[..., R:]
    return y
