"""Linear attention: the one recurrence that every linear mixer calls."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference
from kernels.backend import device_kind
from kernels.chunked import linear_attention as chunked
from kernels.packing import check_cu_seqlens

Backend = Literal["auto", "triton", "torch", "reference"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with any decay, with or without the delta rule.

    For one head, with state S (Dk × Dv) and a_t = exp(decay_t):

        S_t = (I − β_t k_t k_tᵀ) · Diag(a_t) · S_{t−1} + β_t k_t v_tᵀ     with β
        S_t =                      Diag(a_t) · S_{t−1} +     k_t v_tᵀ     without
        o_t = scale · S_tᵀ q_t

    Args:
        q, k: (B, T, Hk, Dk), floating point, one dtype.
        v: (B, T, Hv, Dv), the dtype of q; Hv a multiple of Hk (value head h reads
            key head h // (Hv / Hk)).
        decay: log decay, ≤ 0: None, (Hv,), (B, T, Hv) or (B, T, Hv, Dk). Best in fp32.
        beta: None or (B, T, Hv), in [0, 2); with it the update is the delta rule, which
            wants k of length at most one.
        scale: factor on o, `Dk ** -0.5` unless given.
        initial_state: (N, Hv, Dk, Dv), fp32, for N sequences (N = B without `cu_seqlens`). Zeros
            unless given.
        output_final_state: return the state after the last token of each sequence too.
        cu_seqlens: (N + 1,) int, rising from 0: sequence n is rows
            `cu_seqlens[n]:cu_seqlens[n + 1]` of the one batch row (B must be 1). A state
            never crosses a boundary; empty sequences are allowed; rows at or past
            `cu_seqlens[-1]` give zeros and take no gradient.
        backend: "triton" (GPU; on a CPU in Triton's interpreter, with TRITON_INTERPRET=1),
            "torch" (chunked, any device), "reference" (token by token), or "auto": the
            fastest one that runs here.

    Returns:
        o (B, T, Hv, Dv) in the dtype of v, and the final state (N, Hv, Dk, Dv) in fp32
        (fp64 for fp64 inputs) or None. All inputs but `cu_seqlens` are differentiable.

    Raises:
        ValueError: shapes, dtypes or arguments do not fit together.

    Sources: gated delta rule, Yang et al. 2024 (arXiv 2412.06464); GLA, arXiv 2312.06635;
    KDA, arXiv 2510.26692.
    """
    check_arguments(q, k, v, decay, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    computed_by = resolve(backend, q, v)
    given = (q, k, v, decay, beta, scale, initial_state, cu_seqlens)
    if computed_by is reference:
        o, state = reference.linear_attention(*given)
    else:
        o, state = _LinearAttention.apply(computed_by, *given)
    return o, state if output_final_state else None


class _LinearAttention(torch.autograd.Function):
    """The op by one of the backends that have a `forward` and a `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        o, state, kept = backend.forward(q, k, v, decay, beta, scale, initial_state, cu_seqlens)
        ctx.save_for_backward(q, k, v, decay, beta, initial_state, cu_seqlens, *kept)
        ctx.backend, ctx.scale = backend, scale
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
        q, k, v, decay, beta, initial_state, cu_seqlens, *kept = ctx.saved_tensors
        *gradients, dinitial = ctx.backend.backward(
            q, k, v, decay, beta, ctx.scale, initial_state, cu_seqlens, tuple(kept), do, dstate
        )
        dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
        return None, *gradients, None, dinitial, None


def resolve(backend: Backend, q: Tensor, v: Tensor) -> ModuleType:
    """The module that computes `linear_attention` for these tensors.

    Raises:
        ValueError: the backend is unknown, or cannot take these tensors.
    """
    widest = max(q.shape[-1], v.shape[-1])
    if backend == "auto":
        fits = device_kind(q) == "cuda" and q.dtype != torch.float64 and widest <= 256
        backend = "triton" if fits else "torch"
    if backend == "torch":
        return chunked
    if backend == "reference":
        return reference
    if backend == "triton":
        if q.dtype == torch.float64:
            raise ValueError("backend 'triton' takes bf16, fp16 or fp32; for float64 use 'torch'")
        if widest > 256:
            raise ValueError(
                f"backend 'triton' takes heads up to 256 wide, not {widest}: use 'torch'"
            )
        if device_kind(q) != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend 'triton' needs tensors on a GPU, not on {q.device}: use 'torch', or set "
                "TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter"
            )
        # Imported here: it takes a second, and Triton is not installed on every system.
        from kernels.triton import linear_attention as triton_backend

        return triton_backend
    raise ValueError(f"backend is {backend!r}; it must be one of auto, triton, torch, reference")


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check shapes and dtypes. No value is read, so no device is waited for."""
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(
            f"q and k must share a shape (B, T, Hk, Dk); got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    B, T, Hk, Dk = q.shape
    if v.dim() != 4 or v.shape[:2] != (B, T) or v.shape[2] % Hk:
        raise ValueError(
            f"v must be ({B}, {T}, a multiple of {Hk} heads, Dv) beside q {tuple(q.shape)}; "
            f"got {tuple(v.shape)}"
        )
    Hv, Dv = v.shape[2:]
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    shapes: list[tuple[int, ...]] = [(Hv,), (B, T, Hv), (B, T, Hv, Dk)]
    if decay is not None and tuple(decay.shape) not in shapes:
        raise ValueError(f"decay must be one of {shapes}; got {tuple(decay.shape)}")
    if beta is not None and beta.shape != (B, T, Hv):
        raise ValueError(f"beta must be {(B, T, Hv)}; got {tuple(beta.shape)}")
    N = check_cu_seqlens(B, cu_seqlens)
    if initial_state is not None and initial_state.shape != (N, Hv, Dk, Dv):
        raise ValueError(
            f"initial_state must be {(N, Hv, Dk, Dv)} for {N} sequences; "
            f"got {tuple(initial_state.shape)}"
        )
