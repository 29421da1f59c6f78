"""Rotary position embedding.

    y_i = x_i · cos φ − x_{i+R/2} · sin φ,   y_{i+R/2} = x_i · sin φ + x_{i+R/2} · cos φ

A program computes a few tokens, and their angles once for all heads: one read and one write of x,
where torch's operators make nine passes. The backward pass rotates by −φ.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import DTYPES, Launch, launch, recording

TOKENS = 16  # of a program
NUM_WARPS = 4
GENERIC = ["tokens", "length", "batch_stride", "token_stride", "head_stride"]


@triton.jit
def cos_sin(turns):
    """cos and sin of 2π · turns for turns in −½ … ½, to 2·10⁻⁷.

    The library's functions have a path for large angles, which spills. Here: Taylor series at half
    the angle, a = π · turns, |a| ≤ π/2; then cos 2a = 1 − 2 sin² a and sin 2a = 2 sin a · cos a.
    """
    a = turns * 3.141592653589793
    square = a * a
    sin = 1 - square / 156
    sin = 1 - square / 110 * sin
    sin = 1 - square / 72 * sin
    sin = 1 - square / 42 * sin
    sin = 1 - square / 20 * sin
    sin = (1 - square / 6 * sin) * a
    cos = 1 - square / 182
    cos = 1 - square / 132 * cos
    cos = 1 - square / 90 * cos
    cos = 1 - square / 56 * cos
    cos = 1 - square / 30 * cos
    cos = 1 - square / 12 * cos
    cos = 1 - square / 2 * cos
    return 1 - 2 * sin * sin, 2 * sin * cos


@triton.jit(do_not_specialize=GENERIC)
def rotate(
    x, positions, frequencies, y, tokens, length, batch_stride, token_stride, head_stride, H, D,
    sign: tl.constexpr, R: tl.constexpr, BATCHED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch, row = token // length, token % length
    present = token < tokens
    place = tl.where(present, token if BATCHED else row, 0)
    half = tl.arange(0, HALF)
    position = tl.load(positions + place, mask=present, other=0).to(tl.float64)
    frequency = tl.load(frequencies + half, mask=half < R // 2, other=0.0)
    turns = position[:, None] * frequency[None, :]
    cos, sin = cos_sin((turns - tl.floor(turns + 0.5)).to(tl.float32))
    sin *= sign
    mask = present[:, None] & (half < R // 2)[None, :]
    for h in range(H):
        source = x + (batch * batch_stride + row * token_stride + h * head_stride)[:, None]
        target = y + ((token * H + h) * D)[:, None]
        first = tl.load(source + half[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + R // 2 + half[None, :], mask=mask, other=0.0).to(tl.float32)
        turned = (first * cos - second * sin).to(y.dtype.element_ty)
        tl.store(target + half[None, :], turned, mask=mask)
        turned = (first * sin + second * cos).to(y.dtype.element_ty)
        tl.store(target + R // 2 + half[None, :], turned, mask=mask)
        if REST > 0:
            channel = R + tl.arange(0, REST)
            rest = present[:, None] & (channel < D)[None, :]
            unchanged = tl.load(source + channel[None, :], mask=rest, other=0.0)
            tl.store(target + channel[None, :], unchanged, mask=rest)


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor, sign: int) -> Tensor:
    """x (B, T, H, D) rotated by sign · position · frequency, (R / 2,) fp64 in turns."""
    B, T, H, D = x.shape
    R = 2 * len(frequencies)
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        rotate, (-(-B * T // TOKENS),),
        x, positions.contiguous(), frequencies, y, B * T, T, *x.stride()[:3], H, D,
        sign=sign, R=R, BATCHED=positions.dim() == 2,
        HALF=triton.next_power_of_2(R // 2),
        REST=triton.next_power_of_2(D - R) if D > R else 0,
        TOKENS=TOKENS, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return y


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """The kernel at usual head dims, forward and backward, with its name."""
    for dtype, (D, R) in product(DTYPES, ((64, 64), (128, 128), (256, 64))):
        x: Any = torch.empty(2, 8192, 16, D, dtype=dtype, device="meta")
        positions = torch.empty(8192, dtype=torch.int64, device="meta")
        frequencies = torch.empty(R // 2, dtype=torch.float64, device="meta")
        for sign in (1, -1):
            with recording(arch) as launches:
                rotated(x, positions, frequencies, sign)
            for launched in launches:
                name = f"rotary D{D} R{R} {str(dtype).removeprefix('torch.')}"
                yield f"{name} {'forward' if sign > 0 else 'backward'}", launched
