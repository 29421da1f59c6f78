"""MLPs of experts: grouped products over rows sorted by expert, activation, and the weighted sum.

    h_r = up_e x_t,   a_r = w_r act(h_r),   p_r = out_e a_r,   y_t = Σ_r p_r,   t the token of r
    da_r = out_eᵀ dy_t,   dw_r = ⟨da_r, act(h_r)⟩,   dh_r = act'(h_r) w_r da_r
    dx_t = Σ_r up_eᵀ dh_r,   dup_e = Σ_r dh_r x_tᵀ,   dout_e = Σ_r dy_t a_rᵀ

`products` computes a tile of rows of one expert; rows of x and dy are gathered as they are loaded.
Which expert a tile is of, its program finds in the table of tiles, which the device makes from the
ends of the experts' rows: the grid is as large as any routing needs, and the programs left over do
nothing. `weight_gradients` sums over the rows of one expert, in registers, in one order. Nothing is
added atomically. Kept for the backward pass are x, h (R, U), and rows and weights (R,).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton.launch import DTYPES, Launch, architecture, launch, recording
from kernels.triton.tiles import INTERPRETED

MOST_EXPERTS = 4096  # whose ends a program reads at once
COLUMNS = 1024  # of a row that a program of `combine` or of the activation holds at a time


@triton.jit
def multiply(a, b):
    """a · b, operands in their own dtype, summed in fp32."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    elif INTERPRETED:  # it multiplies bf16 wrongly; in fp32 the products are exact
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit(do_not_specialize=["E"])
def products(
    a, b, c, rows, ends, tiles, E, N, K,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c_r = b_e a_{t(r)}: a (T or R, K), c (R, N), and b (E, N, K), or (E, K, N) if TRANSPOSED."""
    tile = tl.program_id(1)
    each = tl.arange(0, EXPERTS)
    done = tl.load(tiles + 1 + each, mask=each < E, other=2147483647)
    expert = tl.sum((done <= tile).to(tl.int32), 0)
    if expert < E:
        begins = tl.load(ends + expert) + (tile - tl.load(tiles + expert)) * BLOCK_M
        row = begins + tl.arange(0, BLOCK_M)
        inside = row < tl.load(ends + expert + 1)
        source = row.to(tl.int64)
        if GATHER:
            source = tl.load(rows + row, mask=inside, other=0)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        left = a + source[:, None] * K + k[None, :]
        weight = b + expert.to(tl.int64) * N * K
        if TRANSPOSED:
            right = weight + k[:, None] * N + n[None, :]
        else:
            right = weight + n[None, :] * K + k[:, None]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, K, BLOCK_K):
            here = first + k < K
            x = tl.load(left, mask=inside[:, None] & here[None, :], other=0.0)
            w = tl.load(right, mask=here[:, None] & (n < N)[None, :], other=0.0)
            total += multiply(x, w)
            left += BLOCK_K
            right += BLOCK_K * N if TRANSPOSED else BLOCK_K
        place = c + row.to(tl.int64)[:, None] * N + n[None, :]
        mask = inside[:, None] & (n < N)[None, :]
        tl.store(place, total.to(c.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradients(
    a, b, c, rows, ends, N, K,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c_e = Σ_r a_r b_rᵀ over the rows of expert e: a (., N), b (., K), c (E, N, K)."""
    expert = tl.program_id(2)
    start, end = tl.load(ends + expert), tl.load(ends + expert + 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < end
        own = row.to(tl.int64)
        token = own
        if GATHER_A or GATHER_B:
            token = tl.load(rows + row, mask=inside, other=0)
        of_a = token if GATHER_A else own
        of_b = token if GATHER_B else own
        x = tl.load(
            a + of_a[None, :] * N + n[:, None], mask=inside[None, :] & (n < N)[:, None], other=0.0
        )
        y = tl.load(
            b + of_b[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0
        )
        total += multiply(x, y)
    place = c + expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(place, total.to(c.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _parts(h, row, i, mask, inner, GATED: tl.constexpr, LIMIT: tl.constexpr):
    """Of columns i of a row of h (R, U) in fp32: gate and up as they act, and as they are."""
    if GATED:
        place = h + row * 2 * inner + i
        raw_gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        raw_up = tl.load(place + inner, mask=mask, other=0.0).to(tl.float32)
        gate, up = raw_gate, raw_up
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate, up, raw_gate, raw_up
    else:
        value = tl.load(h + row * inner + i, mask=mask, other=0.0).to(tl.float32)
        positive = tl.maximum(value, 0.0)
        return positive, positive, value, value


@triton.jit
def activate(h, weights, a, inner, GATED: tl.constexpr, LIMIT: tl.constexpr, COLUMNS: tl.constexpr):
    """a_r = w_r act(h_r)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate, up, _, _ = _parts(h, row, i, i < inner, inner, GATED, LIMIT)
    act = gate * tl.sigmoid(gate) * up if GATED else gate * up
    act *= tl.load(weights + row).to(tl.float32)
    tl.store(a + row * inner + i, act.to(a.dtype.element_ty), mask=i < inner)


@triton.jit
def activate_gradient(
    h, weights, da, a, dh, dweights, ends, E, inner,
    GATED: tl.constexpr, LIMIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a_r once more, dh_r and dw_r, from da_r (R, I); dw is 0 in rows of no expert."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weights + row).to(tl.float32)
    met = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, inner, COLUMNS):
        i = first + tl.arange(0, COLUMNS)
        mask = i < inner
        gate, up, raw_gate, raw_up = _parts(h, row, i, mask, inner, GATED, LIMIT)
        d = tl.load(da + row * inner + i, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            share = tl.sigmoid(gate)
            act = gate * share * up
            dgate = w * d * up * share * (1 + gate * (1 - share))
            dup = w * d * gate * share
            if LIMIT is not None:
                dgate = tl.where(raw_gate > LIMIT, 0.0, dgate)
                dup = tl.where(tl.abs(raw_up) > LIMIT, 0.0, dup)
            place = dh + row * 2 * inner + i
            tl.store(place, dgate.to(dh.dtype.element_ty), mask=mask)
            tl.store(place + inner, dup.to(dh.dtype.element_ty), mask=mask)
        else:
            act = gate * up
            tl.store(dh + row * inner + i, (2 * w * d * gate).to(dh.dtype.element_ty), mask=mask)
        met += d * act
        tl.store(a + row * inner + i, (w * act).to(a.dtype.element_ty), mask=mask)
    dw = tl.where(row < tl.load(ends + E), tl.sum(met, 0), 0.0)
    tl.store(dweights + row, dw.to(dweights.dtype.element_ty))


@triton.jit
def combine(parts, y, order, starts, ends, E, D, COLUMNS: tl.constexpr):
    """y_t = Σ parts_r over the rows of token t, which are order[starts[t]:starts[t + 1]]."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.load(ends + E)
    total = tl.zeros([COLUMNS], tl.float32)
    for place in range(tl.load(starts + token), tl.load(starts + token + 1)):
        row = tl.load(order + place)
        part = tl.load(parts + row * D + i, mask=i < D, other=0.0).to(tl.float32)
        total += tl.where(row < last, part, 0.0)  # rows of no expert are not set
    tl.store(y + token * D + i, total.to(y.dtype.element_ty), mask=i < D)


class Blocks(NamedTuple):
    """Launch parameters of the products."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int


def blocks(arch: str, dtype: torch.dtype, rows: int) -> Blocks:
    """Launch parameters for experts of about `rows` rows each.

    bf16 and fp16 take the tiles that cuBLAS takes for products this wide, 128 × 128; an expert of
    fewer rows has lower ones, since a tile that is not full works for nothing. fp32 has no tensor
    cores: its sums fill the registers at 64 × 64. None was timed on a GPU yet.
    """
    M = 128 if rows >= 96 else 64 if rows >= 24 else 16
    if dtype == torch.float32 or not arch.startswith("sm_"):
        return Blocks(min(M, 64), 64, 32, 8 if M > 16 else 4, 1)
    if arch == "sm_80":
        return Blocks(M, 128, 32, 8 if M > 64 else 4, 3)
    return Blocks(M, 128, 64, 8 if M > 64 else 4, 3)


class _Table(NamedTuple):
    """Where each expert's rows lie, and each token's.

    ends: (E + 1,) int32, 0 before the first. order: (R,) int64, rows by token.
    starts: (T + 1,) int32, where a token's rows begin in `order`.
    """

    ends: Tensor
    order: Tensor
    starts: Tensor


def _table(rows: Tensor, ends: Tensor, tokens: int) -> _Table:
    by_token, order = torch.sort(rows, stable=True)
    every = torch.arange(tokens + 1, device=rows.device)
    starts = torch.searchsorted(by_token, every, out_int32=True)
    padded = torch.zeros(len(ends) + 1, dtype=torch.int32, device=rows.device)
    padded[1:] = ends
    return _Table(padded, order, starts)


def _products(
    a: Tensor, b: Tensor, rows: Tensor, table: _Table, gather: bool, transposed: bool = False
) -> Tensor:
    """c (R, N) of `products`."""
    R, E = len(rows), b.shape[0]
    N, K = (b.shape[2], b.shape[1]) if transposed else (b.shape[1], b.shape[2])
    c = torch.empty(R, N, dtype=a.dtype, device=a.device)
    block = blocks(architecture(a.device), a.dtype, R // E)
    counts = table.ends.diff()
    tiles = torch.zeros_like(table.ends)
    tiles[1:] = ((counts + (block.M - 1)) // block.M).cumsum(0)
    grid = (triton.cdiv(N, block.N), R // block.M + E)
    launch(
        products, grid, a, b, c, rows, table.ends, tiles, E, N, K,
        GATHER=gather, TRANSPOSED=transposed, EXPERTS=triton.next_power_of_2(E),
        BLOCK_M=block.M, BLOCK_N=block.N, BLOCK_K=block.K,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return c


def _weight_gradients(
    a: Tensor, b: Tensor, rows: Tensor, table: _Table, gather_a: bool, gather_b: bool
) -> Tensor:
    """c (E, N, K) of `weight_gradients`."""
    E, N, K = len(table.ends) - 1, a.shape[1], b.shape[1]
    c = torch.empty(E, N, K, dtype=a.dtype, device=a.device)
    block = blocks(architecture(a.device), a.dtype, 128)
    grid = (triton.cdiv(K, block.N), triton.cdiv(N, block.M), E)
    launch(
        weight_gradients, grid, a, b, c, rows, table.ends, N, K,
        GATHER_A=gather_a, GATHER_B=gather_b,
        BLOCK_R=block.K, BLOCK_N=block.M, BLOCK_K=block.N,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return c


def _combine(parts: Tensor, table: _Table, tokens: int) -> Tensor:
    """y (T, D) of `combine`."""
    D = parts.shape[1]
    y = torch.empty(tokens, D, dtype=parts.dtype, device=parts.device)
    launch(
        combine, (tokens, triton.cdiv(D, COLUMNS)), parts, y, table.order, table.starts, table.ends,
        len(table.ends) - 1, D, COLUMNS=COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, rows: Tensor, ends: Tensor, up: Tensor, out: Tensor,
        activation: str, limit: float | None,
    ) -> Tensor:  # fmt: skip
        x, weights, up, out = (tensor.contiguous() for tensor in (x, weights, up, out))
        table = _table(rows, ends, len(x))
        h = _products(x, up, rows, table, gather=True)
        inner = out.shape[2]
        a = torch.empty(len(rows), inner, dtype=x.dtype, device=x.device)
        launch(
            activate, (len(rows), triton.cdiv(inner, COLUMNS)), h, weights, a, inner,
            GATED=activation == "swiglu", LIMIT=limit, COLUMNS=COLUMNS, num_warps=4, num_stages=1,
        )  # fmt: skip
        y = _combine(_products(a, out, rows, table, gather=False), table, len(x))
        ctx.save_for_backward(x, weights, rows, ends, up, out, h)
        ctx.form = activation, limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, rows, ends, up, out, h = ctx.saved_tensors
        activation, limit = ctx.form
        dy = dy.contiguous()
        table = _table(rows, ends, len(x))
        da = _products(dy, out, rows, table, gather=True, transposed=True)
        a, dh, dweights = torch.empty_like(da), torch.empty_like(h), torch.empty_like(weights)
        launch(
            activate_gradient, (len(rows),), h, weights, da, a, dh, dweights, table.ends, len(up),
            out.shape[2], GATED=activation == "swiglu", LIMIT=limit, COLUMNS=COLUMNS,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        del da
        dout = _weight_gradients(dy, a, rows, table, True, False)
        del a
        dup = _weight_gradients(dh, x, rows, table, False, True)
        dx = _combine(_products(dh, up, rows, table, False, transposed=True), table, len(x))
        return dx, dweights, None, None, dup, dout, None, None


def expert_mlp(
    x: Tensor, weights: Tensor, rows: Tensor, ends: Tensor, up: Tensor, out: Tensor,
    activation: str, limit: float | None,
) -> Tensor:  # fmt: skip
    """As `kernels.expert_mlp`, for at most `MOST_EXPERTS` experts."""
    y: Tensor = _ExpertMLP.apply(x, weights, rows, ends, up, out, activation, limit)
    return y


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """The launches of Qwen3-Next's experts with many, some and few rows each, with names."""
    D, inner, E = 2048, 512, 512
    for dtype in DTYPES:
        for many in (128, 32, 8):
            for activation, limit in (("swiglu", None), ("swiglu", 7.0), ("relu2", None)):
                width = 2 * inner if activation == "swiglu" else inner
                x = torch.empty(E * many // 8, D, dtype=dtype, device="meta")
                up = torch.empty(E, width, D, dtype=dtype, device="meta")
                out = torch.empty(E, D, inner, dtype=dtype, device="meta")
                rows = torch.empty(E * many, dtype=torch.int64, device="meta")
                weights = torch.empty(E * many, device="meta")
                ends = torch.empty(E, dtype=torch.int32, device="meta")
                leaves = [tensor.requires_grad_() for tensor in (x, weights, up, out)]
                with recording(arch) as launches:
                    y = expert_mlp(x, weights, rows, ends, up, out, activation, limit)
                    torch.autograd.grad(y, leaves, torch.empty_like(y))
                form = activation if limit is None else f"{activation} limited"
                name = f"experts {form} {many} rows {str(dtype).removeprefix('torch.')}"
                for launched in launches:
                    yield f"{name} {launched.kernel.__name__}", launched
