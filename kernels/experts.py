"""MLPs of experts: each token's row through the few MLPs that it has chosen.

    y_t = Σ over the rows r of token t:   w_r · out_e · act(up_e · x_t),   e the expert of row r

A row is one token at one of its experts. Rows come sorted by expert, with the end of each expert's
run: no row is padded or dropped, and an expert may have none of them or all. `act` is
SiLU(gate) ⊙ up of the two halves of its input ("swiglu"; with a `limit` the gate is at most that
and |up| too), or the square of ReLU ("relu2").
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import Backend, use_triton
from kernels.packing import accumulation_dtype

Activation = Literal["swiglu", "relu2"]

# Rows of one expert that torch computes at a time: what it needs beside its result stays bounded
# where one expert has all rows. Products of more rows are no faster on a CPU.
PIECE = 2048


def by_expert(experts: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and ends as `expert_mlp` takes them, of tokens and the experts they chose.

    Args:
        experts: (T, k) int, `count` or more for none; those come after the last end.
        weights: (T, k).

    Returns:
        (T · k,) int64, (T · k,) and (count,) int32. A token's rows at one expert stay in order.
    """
    # int16 is sorted in half the time on a CPU.
    sorted_, order = experts.flatten().to(torch.int16).sort(stable=True)
    each = torch.arange(count, dtype=torch.int16, device=experts.device)
    ends = torch.searchsorted(sorted_, each, right=True, out_int32=True)
    return order // experts.shape[1], weights.flatten()[order], ends


def expert_mlp(
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    ends: Tensor,
    up: Tensor,
    out: Tensor,
    *,
    activation: Activation = "swiglu",
    limit: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        x: (T, D), fp16, bf16, fp32 or fp64.
        rows: (R,) int64, the token of each row, rows of one expert after another.
        weights: (R,) floating point, the factor on each row's result.
        ends: (E,) int, where the rows of each expert end; not decreasing, at most R. Rows past the
            last end belong to no expert: they add nothing.
        up: (E, U, D) in the dtype of x; U is 2·I for "swiglu" (gate, then up), else I.
        out: (E, D, I).
        limit: bound of "swiglu"'s gate (above) and up (on both sides); None for no bound.
        backend: "triton" (GPU), "torch" (any device), or "auto".

    Returns:
        y, (T, D) in the dtype of x; sums over a token's rows are fp32 (fp64 for fp64 inputs), and
        in an order that does not change. Gradients reach x, weights, up and out. For the backward
        pass a row keeps up_e · x_t, its token and its weight: U numbers of x's dtype, and 12 bytes.
        Nothing waits for the device: it alone reads `ends`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    E, U, D = up.shape if up.dim() == 3 else (0, 0, 0)
    inner = U // 2 if activation == "swiglu" else U
    if activation not in ("swiglu", "relu2"):
        raise ValueError(f"activation is {activation!r}; it must be swiglu or relu2")
    if x.dim() != 2 or not x.is_floating_point() or not E or x.shape[1] != D:
        raise ValueError(
            f"x must be (T, D) floating point and up (E, U, D); got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(up.shape)}"
        )
    if out.shape != (E, D, inner) or (activation == "swiglu" and U % 2):
        raise ValueError(
            f"out must be (E, D, I) = {(E, D, inner)} beside up {tuple(up.shape)} for "
            f"{activation}; got {tuple(out.shape)}"
        )
    if up.dtype != x.dtype or out.dtype != x.dtype:
        raise ValueError(f"up and out must be {x.dtype} as x; got {up.dtype} and {out.dtype}")
    if rows.dim() != 1 or rows.shape != weights.shape or ends.shape != (E,):
        raise ValueError(
            f"rows and weights must be (R,), and ends ({E},); got {tuple(rows.shape)}, "
            f"{tuple(weights.shape)} and {tuple(ends.shape)}"
        )
    if limit is not None and (activation != "swiglu" or limit <= 0):
        raise ValueError(f"limit is {limit}; only swiglu has one, and it must be above 0")
    if use_triton(backend, x) and len(rows):
        from kernels.triton import experts as compiled

        if E <= compiled.MOST_EXPERTS:
            return compiled.expert_mlp(x, weights, rows, ends, up, out, activation, limit)
    return _ExpertMLP.apply(x, weights, rows, ends, up, out, activation, limit)


class _ExpertMLP(torch.autograd.Function):
    """One expert after the other, its rows in pieces that stay in the caches."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        rows: Tensor,
        ends: Tensor,
        up: Tensor,
        out: Tensor,
        activation: Activation,
        limit: float | None,
    ) -> Tensor:
        full = accumulation_dtype(x.dtype)
        h = x.new_empty(len(rows), up.shape[1])  # (R, U)
        y = torch.zeros_like(x, dtype=full)
        for expert, piece in _pieces(ends, len(rows)):
            token = rows[piece]
            torch.mm(x.index_select(0, token), up[expert].mT, out=h[piece])
            a, _, _ = _activated(h[piece].to(full), activation, limit)
            a.mul_(weights[piece].to(full).unsqueeze(1))
            y.index_add_(0, token, torch.mm(a.to(x.dtype), out[expert].mT).to(full))
        ctx.save_for_backward(x, weights, rows, ends, up, out, h)
        ctx.form = activation, limit
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, rows, ends, up, out, h = ctx.saved_tensors
        full = accumulation_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=full)
        dweights = torch.zeros_like(weights)
        dup, dout = torch.empty_like(up), torch.empty_like(out)
        untouched = set(range(len(up)))
        for expert, piece in _pieces(ends, len(rows)):
            token, w = rows[piece], weights[piece].to(full).unsqueeze(1)
            dy_rows = dy.index_select(0, token)  # (n, D)
            da = torch.mm(dy_rows, out[expert]).to(full)  # (n, I), before the weight
            given = h[piece].to(full)
            a, gate, above = _activated(given, *ctx.form)
            dweights[piece] = (da * a).sum(1)
            a.mul_(w)
            da.mul_(w)
            dh = _activated_backward(given, gate, above, da, *ctx.form).to(x.dtype)  # (n, U)
            first = expert in untouched
            untouched.discard(expert)
            _onto(dout[expert], dy_rows.mT, a.to(x.dtype), first)
            _onto(dup[expert], dh.mT, x.index_select(0, token), first)
            dx.index_add_(0, token, torch.mm(dh, up[expert]).to(full))
        for expert in untouched:
            dup[expert].zero_()
            dout[expert].zero_()
        return dx.to(x.dtype), dweights, None, None, dup, dout, None, None


def _onto(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b, or total += a b, rounded once a piece."""
    if first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _pieces(ends: Tensor, count: int) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows, at most `PIECE` at a time.

    Of tensors without numbers, as if every expert had as many rows as the others.
    """
    if not count:
        return  # without a look at `ends`
    experts = len(ends)
    even = [count * (i + 1) // experts for i in range(experts)]
    bounds = [0, *(even if ends.is_meta else ends.tolist())]
    for expert, (start, end) in enumerate(pairwise(bounds)):
        for first in range(start, end, PIECE):
            yield expert, slice(first, min(first + PIECE, end))


def _activated(
    h: Tensor, activation: Activation, limit: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """act(h) (n, I) of h (n, U), a tensor of its own; and the gate and up that it is made of."""
    if activation == "relu2":
        positive = h.clamp(min=0)
        return positive.square(), positive, positive
    gate, up = h.chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate).mul_(up), gate, up


def _activated_backward(
    h: Tensor, gate: Tensor, up: Tensor, da: Tensor, activation: Activation, limit: float | None
) -> Tensor:
    """The gradient of h (n, U) from that of act(h) (n, I), which is overwritten."""
    if activation == "relu2":
        return da.mul_(gate).mul_(2)
    dh = torch.empty_like(h)
    inner = da.shape[1]
    torch.mul(da, F.silu(gate), out=dh[:, inner:])
    dh[:, :inner] = torch.ops.aten.silu_backward(da.mul_(up), gate)
    if limit is not None:
        dh[:, :inner].masked_fill_(h[:, :inner] > limit, 0)
        dh[:, inner:].masked_fill_(h[:, inner:].abs() > limit, 0)
    return dh
