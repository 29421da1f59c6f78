"""The recurrence with an element-wise state (HGRN, Mamba-1, LSSL)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import accumulation_dtype, check_cu_seqlens, host_bounds

# Rows that one pass of the scan walks, for all chunks side by side. A scan of T rows takes
# CHUNK + CHUNK + T / CHUNK² … steps, each over T / CHUNK rows at once.
CHUNK = 64


def diagonal_scan(
    x: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run an element-wise linear recurrence along each sequence.

        h_t = exp(decay_t) · h_{t−1} + x_t

    Args:
        x: (B, T, D), floating point.
        decay: (B, T, D), log decay ≤ 0, best in fp32.
        initial_state: (N, D), fp32, zeros unless given; N is the number of sequences (B
            without `cu_seqlens`).
        output_final_state: return the state after the last token of each sequence too.
        cu_seqlens: (N + 1,) int, packed sequences as in `kernels.linear_attention`: B must
            be 1, empty sequences are allowed, rows at or past `cu_seqlens[-1]` give zeros
            and take no gradient.

    Returns:
        h (B, T, D) in the dtype of x, and the final state (N, D) in fp32 (fp64 for fp64
        inputs) or None. All inputs but `cu_seqlens` are differentiable. States are fp32
        (fp64); decays are only ever multiplied, never divided by, so any decay ≤ 0 is
        finite. The backward keeps decay and h.

    Raises:
        ValueError: shapes or arguments do not fit together.

    Sources: HGRN, Qin et al. 2023 (arXiv 2311.04823); Mamba, Gu & Dao 2023
    (arXiv 2312.00752).
    """
    if x.dim() != 3 or x.shape != decay.shape or not x.is_floating_point():
        raise ValueError(
            "x and decay must share a shape (B, T, D), floating point; "
            f"got {tuple(x.shape)} {x.dtype} and {tuple(decay.shape)}"
        )
    B, T, D = x.shape
    N = check_cu_seqlens(B, cu_seqlens)
    if initial_state is not None and initial_state.shape != (N, D):
        raise ValueError(
            f"initial_state must be {(N, D)} for {N} sequences; got {tuple(initial_state.shape)}"
        )
    bounds = host_bounds(B, T, cu_seqlens)
    h, final_state = _DiagonalScan.apply(
        x.reshape(B * T, D), decay.reshape(B * T, D), initial_state, bounds
    )
    return h.view(B, T, D), final_state if output_final_state else None


class _DiagonalScan(torch.autograd.Function):
    """All sequences in one scan: a factor of zero at a first row forgets the sequence before."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decay: Tensor, initial_state: Tensor | None, bounds: list[int]
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(x.dtype)
        n, first, last = _sequences(bounds, x.device)
        end = bounds[-1]
        factor = decay[:end].to(dtype).exp()
        inputs = x[:end].to(dtype)
        if initial_state is None:
            final = x.new_zeros(len(bounds) - 1, x.shape[1], dtype=dtype)
        else:
            final = initial_state.to(dtype, copy=True)
            inputs = inputs.index_add(0, first, factor[first] * final[n])
        factor[first] = 0
        h = x.new_zeros(x.shape)
        states = _scan(factor, inputs)
        h[:end] = states
        final[n] = states[last]
        ctx.save_for_backward(decay, initial_state, h)
        ctx.bounds = bounds
        ctx.set_materialize_grads(False)
        return h, final

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        decay, initial_state, h = ctx.saved_tensors
        bounds: list[int] = ctx.bounds
        dtype = accumulation_dtype(h.dtype)
        n, first, last = _sequences(bounds, h.device)
        end = bounds[-1]
        factor = decay[:end].to(dtype).exp()
        gradient = torch.zeros_like(factor) if dh is None else dh[:end].to(dtype, copy=True)
        if dfinal is not None:
            gradient[last] += dfinal[n].to(dtype)

        # g_t = dh_t + exp(decay_{t+1}) · g_{t+1}: the same scan from the other end.
        reverse = torch.zeros_like(factor)
        reverse[1:] = factor.flip(0)[:-1]
        reverse[end - 1 - last] = 0
        gradient = _scan(reverse, gradient.flip(0)).flip(0)

        previous = torch.zeros_like(factor)
        previous[1:] = h[: max(end - 1, 0)]
        previous[first] = 0 if initial_state is None else initial_state[n].to(dtype)
        dx = torch.zeros_like(h)
        dx[:end] = gradient
        ddecay = torch.zeros_like(decay)
        ddecay[:end] = factor.mul(previous).mul_(gradient)
        dstate = None
        if initial_state is not None:
            dstate = torch.zeros_like(initial_state) if dfinal is None else dfinal.clone()
            dstate[n] = (factor[first] * gradient[first]).to(dstate.dtype)
            dstate = dstate.to(initial_state.dtype)
        return dx, ddecay, dstate, None


def _sequences(bounds: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Number, first and last row of every sequence that has rows."""
    edges = torch.tensor(bounds, device=device)
    n = (edges[1:] > edges[:-1]).nonzero().squeeze(1)
    return n, edges[n], edges[n + 1] - 1


def _scan(factor: Tensor, x: Tensor) -> Tensor:
    """h_t = factor_t · h_{t−1} + x_t over the rows of (T, D), from zero.

    Chunks of CHUNK rows are walked side by side from zero; the same scan over the chunks'
    last rows gives the states that enter them, and each row adds its share of those.
    """
    T, D = x.shape
    chunks = max(-(-T // CHUNK), 1)
    if chunks > 1:
        pad = (0, 0, 0, chunks * CHUNK - T)
        factor, x = F.pad(factor, pad), F.pad(x, pad)
    rows = len(x) // chunks
    product, h = factor.view(chunks, rows, D).clone(), x.view(chunks, rows, D).clone()
    for t in range(1, rows):
        h[:, t].addcmul_(product[:, t], h[:, t - 1])
        product[:, t] *= product[:, t - 1]
    if chunks > 1:
        entering = _scan(product[:-1, -1], h[:-1, -1])
        h[1:].addcmul_(product[1:], entering.unsqueeze(1))
    return h.view(chunks * rows, D)[:T]
