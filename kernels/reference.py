"""The recurrence, token by token: the definition that every other backend is tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.linear_attention` one token after the other; shapes as there.

    S_t = (I − β_t k_t k_tᵀ) · Diag(exp decay_t) · S_{t−1} + β_t k_t v_tᵀ     (delta rule)
    S_t =                      Diag(exp decay_t) · S_{t−1} +     k_t v_tᵀ     (without β)
    o_t = scale · S_tᵀ q_t

    In fp64 when q is fp64, else in fp32; gradients come from autograd.
    """
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    # (B, T, Hk, Dk) -> (B, T, Hv, Dk): value head h reads key head h // (Hv / Hk).
    q, k = (x.to(dtype).repeat_interleave(Hv // Hk, dim=2) for x in (q, k))
    values = v.to(dtype)
    if decay is None:
        decay = values.new_zeros(1)
    decay = decay.to(dtype)
    if decay.dim() == 1:
        decay = decay.expand(B, T, Hv)
    if decay.dim() == 3:
        decay = decay.unsqueeze(-1)  # (B, T, Hv) -> (B, T, Hv, 1)
    a = decay.exp().expand(B, T, Hv, Dk)  # (B, T, Hv, 1 | Dk) -> (B, T, Hv, Dk)

    # (batch row, first token, end) of each sequence.
    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        ends = cu_seqlens.tolist()
        sequences = [(0, start, end) for start, end in pairwise(ends)]

    rows: list[list[Tensor]] = [[values.new_zeros(Hv, Dv)] * T for _ in range(B)]
    final = []
    for n, (b, start, end) in enumerate(sequences):
        S = values.new_zeros(Hv, Dk, Dv) if initial_state is None else initial_state[n].to(dtype)
        for t in range(start, end):
            S = a[b, t, :, :, None] * S
            new = values[b, t]
            if beta is not None:
                seen = torch.einsum("hd,hdv->hv", k[b, t], S)
                new = beta[b, t, :, None].to(dtype) * (new - seen)
            S = S + k[b, t, :, :, None] * new[:, None, :]
            rows[b][t] = scale * torch.einsum("hd,hdv->hv", q[b, t], S)
        final.append(S)

    empty_o = values.new_zeros(B, T, Hv, Dv)
    # B · T of (Hv, Dv) -> (B, T, Hv, Dv); N of (Hv, Dk, Dv) -> (N, Hv, Dk, Dv)
    o = torch.stack([torch.stack(row) for row in rows]) if T and B else empty_o
    state = torch.stack(final) if final else values.new_zeros(0, Hv, Dk, Dv)
    return o.to(v.dtype), state
