"""Root-mean-square norm, plain and gated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.packing import accumulation_dtype

# Elements of a block of rows, 512 KB in fp32: a block is read several times, and stays in a core's
# cache meanwhile.
BLOCK_ELEMENTS = 1 << 17


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Divide each row by its root mean square; optionally scale it and gate it.

        y = x / sqrt(mean(x²) + eps) · weight · silu(gate)

    Args:
        x: (…, D), floating point.
        weight: (D,) or None.
        eps: added to the mean square.
        gate: the shape of x, or None.
        backend: "triton" (GPU), "torch" (any device), or "auto".

    Returns:
        y, the shape and dtype of x. Statistics and products are fp32 (fp64 for fp64
        inputs). The backward keeps the inputs and one number a row.

    Raises:
        ValueError: shapes do not fit together.

    Sources: Zhang & Sennrich 2019 (arXiv 1910.07467); the gate after the norm as in
    Gated DeltaNet (arXiv 2412.06464).
    """
    D = x.shape[-1] if x.dim() else 0
    if D < 1 or not x.is_floating_point():
        raise ValueError(f"x must be (…, D) floating point; got {tuple(x.shape)} {x.dtype}")
    if weight is not None and weight.shape != (D,):
        raise ValueError(
            f"weight must be ({D},) beside x {tuple(x.shape)}; got {tuple(weight.shape)}"
        )
    if gate is not None and gate.shape != x.shape:
        raise ValueError(
            f"gate must have the shape of x, {tuple(x.shape)}; got {tuple(gate.shape)}"
        )
    if use_triton(backend, x):
        from kernels.triton import norm as compiled

        if D <= compiled.MAX_WIDTH:
            return compiled.rms_norm(x, weight, gate, eps)
    rows = x.reshape(-1, D)  # (…, D) -> (rows, D)
    gates = None if gate is None else gate.reshape(-1, D)
    return _RMSNorm.apply(rows, weight, gates, eps).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float
    ) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        D = x.shape[1]
        scale = None if weight is None else weight.detach().to(dtype)
        y = torch.empty_like(x)
        rstd = torch.empty(len(x), 1, dtype=dtype, device=x.device)
        for rows in _blocks(x):
            block = x[rows].to(dtype)
            norm = torch.linalg.vector_norm(block, dim=1, keepdim=True)
            r = norm.square_().div_(D).add_(eps).rsqrt_()
            out = block * r
            if scale is not None:
                out.mul_(scale)
            if gate is not None:
                out.mul_(F.silu(gate[rows].to(dtype)))
            y[rows] = out
            rstd[rows] = r
        ctx.save_for_backward(x, weight, gate, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, rstd = ctx.saved_tensors
        dtype = rstd.dtype
        D = x.shape[1]
        scale = None if weight is None else weight.to(dtype)
        dx = torch.empty_like(x)
        dgate = None if gate is None else torch.empty_like(gate)
        dscale = None if weight is None else torch.zeros(D, dtype=dtype, device=x.device)
        for rows in _blocks(x):
            r = rstd[rows]
            normed = x[rows].to(dtype) * r
            dout = dy[rows].to(dtype)
            shared = dout * normed
            if gate is not None and dgate is not None:
                g = gate[rows].to(dtype)
                dgate[rows] = torch.ops.aten.silu_backward(
                    shared if scale is None else shared * scale, g
                )
                active = F.silu(g)
                dout = dout * active
                shared.mul_(active)
            # dx = rstd · (dout − x̂ · mean(dout · x̂)): the part along the row itself drops out.
            if scale is None or dscale is None:
                along = shared.mean(1, keepdim=True)
            else:
                dscale += shared.sum(0)
                along = torch.mv(shared, scale).div_(D).unsqueeze_(1)
                dout = dout * scale
            dx[rows] = torch.addcmul(dout, normed, along, value=-1).mul_(r)
        return dx, None if dscale is None else dscale.to(weight.dtype), dgate, None


def _blocks(x: Tensor) -> list[slice]:
    """The rows of x (rows, D) in blocks of about `BLOCK_ELEMENTS` elements."""
    step = max(BLOCK_ELEMENTS // x.shape[1], 1)
    return [slice(start, start + step) for start in range(0, len(x), step)]
