"""Short causal convolution.

    pre_t = bias + Σ_{j<W} w_{W−1−j} · x_{t−j},   y = silu(pre)

A program computes up to ROWS rows of one sequence × CHANNELS channels. It loads its inputs once for
each tap: W loads, of which all but one are in the first cache. The W − 1 rows before a sequence's
first are its halo (`initial_state`, or zero). Only the inputs are kept for the backward pass, which
computes pre_t … pre_{t+W−1} again from the same cache; to store their gradients for a second kernel
would cost a round trip to memory:

    dpre_t = dy_t · silu'(pre_t),   dx_t = Σ_{j<W} w_{W−1−j} · dpre_{t+j},
    dw_i = Σ_t dpre_t · x_{t−W+1+i}

The same dx_t at the W − 1 rows before a sequence is the gradient of its halo.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102  (an `if` over a constant must stand alone to be decided at compile time)
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import DTYPES, Launch, launch, recording
from kernels.triton.sequences import (
    chunk_of,
    load_rows,
    packed_bounds,
    programs,
    span,
    store_rows,
)


class Tile(NamedTuple):
    ROWS: int
    CHANNELS: int
    num_warps: int


FORWARD = Tile(64, 64, 8)
BACKWARD = Tile(64, 32, 8)
EDGE_CHANNELS = 128  # channels of a program that works on a sequence's W − 1 halo rows

GENERIC = ["N", "length"]  # arguments whose values must not cause another compilation


@triton.jit
def load_input(
    x, halo, n, start, end, first, shift, c, D,
    W: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(ROWS, CHANNELS): inputs at rows from first + shift, of the halo if before the sequence."""
    value = load_rows(x, first, shift, start, end, c, D, ROWS)
    if HALO:
        if first + shift < start:
            # Row start − 1 is the halo's last row: its rows n (W − 1) to n (W − 1) + W − 2.
            begin = n * (W - 1) + (W - 1)
            above = begin + first - start
            value += load_rows(halo, above, shift, begin - (W - 1), begin, c, D, ROWS)
    return value


@triton.jit
def load_tap(weight, i, c, D, W: tl.constexpr):
    """(1, CHANNELS) fp32: tap i of weight (W, D)."""
    return tl.load(weight + i * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def before_activation(
    x, weight, bias, halo, n, start, end, first, shift, c, D,
    W: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(ROWS, CHANNELS): pre at rows from first + shift."""
    pre = tl.zeros([ROWS, c.shape[0]], tl.float32)
    if BIAS:
        pre += tl.load(bias + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(W):
        value = load_input(x, halo, n, start, end, first, shift + i - W + 1, c, D, W, HALO, ROWS)
        pre += value * load_tap(weight, i, c, D, W)
    return pre


@triton.jit
def gradient_before_activation(
    dy, x, weight, bias, halo, n, start, end, first, shift, c, D,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """(ROWS, CHANNELS): dpre at rows from first + shift, zeros outside the sequence."""
    gradient = load_rows(dy, first, shift, start, end, c, D, ROWS)
    if SILU:
        pre = before_activation(
            x, weight, bias, halo, n, start, end, first, shift, c, D, W, BIAS, HALO, ROWS
        )
        sigmoid = tl.sigmoid(pre)
        gradient *= sigmoid * (1 + pre * (1 - sigmoid))
    return gradient


@triton.jit
def gradient_from_later_rows(
    dy, dfinal, x, weight, bias, halo, n, start, end, first, c, D,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr,
    FINAL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(ROWS, CHANNELS): the terms of dx_t from dpre_{t+1} … dpre_{t+W−1} and the final state."""
    gradient = tl.zeros([ROWS, c.shape[0]], tl.float32)
    for j in tl.static_range(1, W):
        dpre = gradient_before_activation(
            dy, x, weight, bias, halo, n, start, end, first, j, c, D, W, SILU, BIAS, HALO, ROWS
        )
        gradient += dpre * load_tap(weight, W - 1 - j, c, D, W)
    if FINAL:
        if first + ROWS > end - (W - 1):
            stop = n * (W - 1) + (W - 1)
            gradient += load_rows(dfinal, stop + first - end, 0, stop - (W - 1), stop, c, D, ROWS)
    return gradient


@triton.jit(do_not_specialize=GENERIC)
def forward(
    x, weight, bias, halo, y, bounds, N, length, D,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n, start, end, first = chunk_of(tl.program_id(0), bounds, N, length, ROWS, PACKED)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    out = tl.zeros([ROWS, CHANNELS], tl.float32)
    if n < N:
        out = before_activation(
            x, weight, bias, halo, n, start, end, first, 0, c, D, W, BIAS, HALO, ROWS
        )
        if SILU:
            out *= tl.sigmoid(out)
    store_rows(y, out, first, start, end, c, D, ROWS)


@triton.jit(do_not_specialize=GENERIC)
def final_inputs(
    x, halo, final, bounds, length, D,
    W: tl.constexpr, HALO: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """final (N, W − 1, D): the inputs at each sequence's last W − 1 rows."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start, end = span(n, bounds, length, PACKED)
    value = load_input(x, halo, n, start, end, end - (W - 1), 0, c, D, W, HALO, ROWS)
    store_rows(final, value, n * (W - 1), n * (W - 1), n * (W - 1) + (W - 1), c, D, ROWS)


@triton.jit(do_not_specialize=GENERIC)
def backward(
    dy, dfinal, x, weight, bias, halo, dx, dweight, dbias, bounds, N, length, D,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr,
    FINAL: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, and this program's terms of dweight (programs, W, D) and dbias (programs, D)."""
    program = tl.program_id(0).to(tl.int64)
    n, start, end, first = chunk_of(program, bounds, N, length, ROWS, PACKED)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    gradient = tl.zeros([ROWS, CHANNELS], tl.float32)
    if n < N:
        dpre = gradient_before_activation(
            dy, x, weight, bias, halo, n, start, end, first, 0, c, D, W, SILU, BIAS, HALO, ROWS
        )
        for i in tl.static_range(W):
            value = load_input(x, halo, n, start, end, first, i - W + 1, c, D, W, HALO, ROWS)
            tl.store(dweight + (program * W + i) * D + c, tl.sum(dpre * value, 0), mask=c < D)
        if BIAS:
            tl.store(dbias + program * D + c, tl.sum(dpre, 0), mask=c < D)
        gradient = dpre * load_tap(weight, W - 1, c, D, W)
        gradient += gradient_from_later_rows(
            dy, dfinal, x, weight, bias, halo, n, start, end, first, c, D,
            W, SILU, BIAS, HALO, FINAL, ROWS,
        )  # fmt: skip
    else:
        # Rows of no sequence: zeros in dx, dweight and dbias.
        nothing = tl.zeros([CHANNELS], tl.float32)
        for i in tl.static_range(W):
            tl.store(dweight + (program * W + i) * D + c, nothing, mask=c < D)
        if BIAS:
            tl.store(dbias + program * D + c, nothing, mask=c < D)
    store_rows(dx, gradient, first, start, end, c, D, ROWS)


@triton.jit(do_not_specialize=GENERIC)
def halo_gradient(
    dy, dfinal, x, weight, bias, halo, dhalo, bounds, length, D,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr,
    FINAL: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start, end = span(n, bounds, length, PACKED)
    gradient = gradient_from_later_rows(
        dy, dfinal, x, weight, bias, halo, n, start, end, start - (W - 1), c, D,
        W, SILU, BIAS, HALO, FINAL, ROWS,
    )  # fmt: skip
    store_rows(dhalo, gradient, n * (W - 1), n * (W - 1), n * (W - 1) + (W - 1), c, D, ROWS)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        silu: bool,
        bounds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        B, T, D = x.shape
        W = weight.shape[1]
        N = B if bounds is None else len(bounds) - 1
        # (D, W) -> (W, D): the channels of one tap are then adjacent.
        x, taps = x.contiguous(), weight.t().contiguous()
        halo = None if initial_state is None else initial_state.contiguous()
        y = torch.empty_like(x)
        final = x.new_empty(N, W - 1, D)
        constants: dict[str, Any] = {
            "W": W,
            "HALO": halo is not None,
            "PACKED": bounds is not None,
        }
        launch(
            forward, (programs(B, T, bounds, FORWARD.ROWS), -(-D // FORWARD.CHANNELS)),
            x, taps, bias, halo, y, bounds, N, T, D,
            SILU=silu, BIAS=bias is not None, **constants,
            **FORWARD._asdict(), num_stages=1,
        )  # fmt: skip
        if W > 1:
            launch(
                final_inputs, (N, -(-D // EDGE_CHANNELS)), x, halo, final, bounds, T, D,
                **constants, **_edge(W), num_stages=1,
            )  # fmt: skip
        ctx.save_for_backward(x, taps, bias, halo, bounds)
        ctx.weight_dtype = weight.dtype
        ctx.constants = constants | {"SILU": silu, "BIAS": bias is not None}
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, taps, bias, halo, bounds = ctx.saved_tensors
        B, T, D = x.shape
        W = len(taps)
        N = B if bounds is None else len(bounds) - 1
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        constants = ctx.constants | {"FINAL": dfinal is not None}
        count = programs(B, T, bounds, BACKWARD.ROWS)
        dx = torch.empty_like(x)
        dweight = x.new_empty(count, W, D, dtype=torch.float32)
        dbias = None if bias is None else x.new_empty(count, D, dtype=torch.float32)
        launch(
            backward, (count, -(-D // BACKWARD.CHANNELS)),
            dy, dfinal, x, taps, bias, halo, dx, dweight, dbias, bounds, N, T, D,
            **constants, **BACKWARD._asdict(), num_stages=1,
        )  # fmt: skip
        dhalo = None
        if halo is not None:
            dhalo = torch.empty_like(halo)
            if W > 1:
                launch(
                    halo_gradient, (N, -(-D // EDGE_CHANNELS)),
                    dy, dfinal, x, taps, bias, halo, dhalo, bounds, T, D,
                    **constants, **_edge(W), num_stages=1,
                )  # fmt: skip
        return (
            dx,
            dweight.sum(0).t().to(ctx.weight_dtype),
            None if bias is None or dbias is None else dbias.sum(0).to(bias.dtype),
            dhalo,
            None,
            None,
        )


def _edge(W: int) -> dict[str, int]:
    return {"ROWS": triton.next_power_of_2(W - 1), "CHANNELS": EDGE_CHANNELS, "num_warps": 4}


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.short_convolution` with Triton; bf16, fp16 or fp32, W up to 65."""
    bounds = packed_bounds(cu_seqlens, x.device)
    y, final = _ShortConvolution.apply(x, weight, bias, initial_state, silu, bounds)
    return y, final


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """Every launch of a forward and backward pass, with its name."""
    for dtype in DTYPES:
        for packed in (True, False):

            def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

            cu_seqlens = torch.empty(9, dtype=torch.int64, device="meta") if packed else None
            with recording(arch) as launches:
                outputs = short_convolution(
                    empty(1, 8192, 2048), empty(2048, 4), None, True,
                    empty(8 if packed else 1, 3, 2048), cu_seqlens,
                )  # fmt: skip
                torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
            name = f"convolution {'packed ' * packed}{str(dtype).removeprefix('torch.')}"
            for launched in launches:
                yield f"{name} {launched.kernel.__name__}", launched
