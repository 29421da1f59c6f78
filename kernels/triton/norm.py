"""Root-mean-square norm, plain and gated.

    r = 1 / sqrt(mean(x²) + eps),   y = x · r · w · silu(g)

A program computes a few whole rows: one read of x (and g), one write of y. For the backward pass r
is kept, one fp32 number a row. With x̂ = x · r and s = silu(g), for each row

    dx = r · (dy·s·w − x̂ · mean(dy·s·w·x̂)),   dg = dy·w·x̂ · silu'(g),   dw = Σ_rows dy·s·x̂

where a program goes through many rows, so that its terms of dw stay in registers until the end.
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

# The widest row that registers hold; `kernels.rms_norm` computes wider ones in torch.
MAX_WIDTH = 8192
# Programs of the backward pass: a few for each multiprocessor of the largest GPUs. The same number
# everywhere, so that the order of sums does not depend on the device.
PROGRAMS = 512


def tile(width: int) -> dict[str, int]:
    """Launch parameters for rows of that width: 8 elements a thread, up to MAX_WIDTH / 2; in the
    widest row 16, since 32 warps would halve a thread's registers and spill."""
    columns = max(triton.next_power_of_2(width), 16)
    rows = max(1024 // columns, 1)
    warps = min(rows * columns // 256, 16)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": 1}


GENERIC = ["rows", "x_stride", "gate_stride", "dy_stride"]


@triton.jit
def load_rows(x, row, column, stride, mask):
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward(
    x, weight, gate, y, rstd, rows, x_stride, gate_stride, D, eps,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    out = load_rows(x, row, column, x_stride, mask)
    r = 1 / tl.sqrt(tl.sum(out * out, 1) / D + eps)
    tl.store(rstd + row, r, mask=row < rows)
    out *= r[:, None]
    if WEIGHT:
        out *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if GATE:
        g = load_rows(gate, row, column, gate_stride, mask)
        out *= g * tl.sigmoid(g)
    tl.store(y + row[:, None] * D + column[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward(
    dy, x, weight, gate, rstd, dx, dgate, dweight,
    rows, dy_stride, x_stride, gate_stride, D,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    in_row = column < D
    share = tl.zeros([COLUMNS], tl.float32)
    first = program * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed = load_rows(x, row, column, x_stride, mask) * r
        gradient = load_rows(dy, row, column, dy_stride, mask)
        place = row[:, None] * D + column[None, :]
        if WEIGHT:
            # Loaded again for each row, from the cache: a wide row leaves no registers to keep it.
            w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if GATE:
            g = load_rows(gate, row, column, gate_stride, mask)
            sigmoid = tl.sigmoid(g)
            to_gate = gradient * normed * sigmoid * (1 + g * (1 - sigmoid))
            if WEIGHT:
                to_gate *= w
            tl.store(dgate + place, to_gate.to(dgate.dtype.element_ty), mask=mask)
            gradient *= g * sigmoid
        if WEIGHT:
            share += tl.sum(gradient * normed, 0)
            gradient *= w
        along = tl.sum(gradient * normed, 1)[:, None] / D
        gradient = (gradient - normed * along) * r
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=mask)
        first += tl.num_programs(0).to(tl.int64) * ROWS
    if WEIGHT:
        tl.store(dweight + program * D + column, share, mask=in_row)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float
    ) -> Tensor:
        rows, D = x.shape
        x, gate = _readable(x), None if gate is None else _readable(gate)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        parameters = tile(D)
        launch(
            forward, (-(-rows // parameters["ROWS"]),),
            x, weight, gate, y, rstd, rows, x.stride(0), _stride(gate), D, eps,
            WEIGHT=weight is not None, GATE=gate is not None, **parameters,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, gate, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, rstd = ctx.saved_tensors
        rows, D = x.shape
        dy = _readable(dy)
        parameters = tile(D)
        programs = min(-(-rows // parameters["ROWS"]), PROGRAMS)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dgate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        dweight = None
        if weight is not None:
            dweight = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        launch(
            backward, (programs,), dy, x, weight, gate, rstd, dx, dgate, dweight,
            rows, dy.stride(0), x.stride(0), _stride(gate), D,
            WEIGHT=weight is not None, GATE=gate is not None, **parameters,
        )  # fmt: skip
        return dx, None if dweight is None else dweight.sum(0).to(weight.dtype), dgate, None


def _readable(x: Tensor) -> Tensor:
    """x as the kernels can read it: rows may lie apart, as slices of a fused projection do, but the
    channels of a row are adjacent."""
    return x if x.stride(1) == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def rms_norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    """Compute `kernels.rms_norm` with Triton; bf16, fp16 or fp32, rows up to MAX_WIDTH."""
    D = x.shape[-1]
    gates = None if gate is None else gate.reshape(-1, D)
    y: Tensor = _RMSNorm.apply(x.reshape(-1, D), weight, gates, eps)
    return y.view(x.shape)


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """Every launch of a forward and backward pass, with its name."""
    for dtype, D in product(DTYPES, (64, 128, 1024, 4096, MAX_WIDTH)):
        for gated in (False, True):
            x, gate = torch.empty(
                2, 8192, D, dtype=dtype, device="meta", requires_grad=True
            ).unbind()
            weight = torch.empty(D, device="meta", requires_grad=True)
            with recording(arch) as launches:
                y = rms_norm(x, weight, gate if gated else None, 1e-6)
                y.backward(torch.empty_like(y))
            for launched in launches:
                name = f"{'gated ' * gated}norm D{D} {str(dtype).removeprefix('torch.')}"
                yield f"{name} {launched.kernel.__name__}", launched
