"""What a run of tokens does to the state that enters it: S_out = M · S_in + E.

A segment is a sequence, or a fragment of one. M and E depend on its own tokens only, so they can be
computed before S_in is known, and maps of neighbours compose:
(M₂, E₂) ∘ (M₁, E₁) = (M₂M₁, M₂E₁ + E₂). M has the smallest shape that holds it:

    (N, Hv)          no decay, or one a head: a factor
    (N, Hv, Dk)      a decay a channel: a diagonal
    (N, Hv, Dk, Dk)  with the delta rule: a matrix

All is fp32 (fp64 for fp64 inputs), whatever the dtype of the tokens, and under autocast too, since
errors of bf16 maps would grow with every composition. Everything is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import device_kind
from kernels.linear_attention import Backend, check_arguments, final_state
from kernels.packing import accumulation_dtype


def segment_state(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The maps (M, E) of N segments, for the arguments of `kernels.linear_attention`.

    For every S_in, `M · S_in + E` is the op's final state with `initial_state=S_in`. An empty
    segment is the identity. The cost is that of a final state (no outputs) with Dk more columns in
    the state under the delta rule, or one more without.

    Returns:
        M, shaped as above, and E (N, Hv, Dk, Dv).

    Raises:
        ValueError: shapes, dtypes or arguments do not fit together.
    """
    check_arguments(k, k, v, decay, beta, None, cu_seqlens)
    (*_, Dk), (B, T, Hv, Dv) = k.shape, v.shape
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    # M is the final value of extra state columns to which no values are written: with the delta
    # rule Dk columns that start as the identity; without, one column of ones, since channels of
    # keys do not mix.
    unit = torch.ones(Dk, 1, dtype=accumulation_dtype(k.dtype), device=k.device)
    if beta is not None:
        unit = unit.squeeze(1).diag()  # (Dk, 1) -> (Dk, Dk)
    columns = unit.shape[1]
    state = torch.cat([unit.new_zeros(Dk, Dv), unit], dim=1)  # (Dk, Dv + columns)
    values = torch.cat([v, v.new_zeros(B, T, Hv, columns)], dim=-1)  # (B, T, Hv, Dv + columns)
    final = final_state(k, values, decay, beta, state.expand(N, Hv, -1, -1), cu_seqlens, backend)
    # (N, Hv, Dk, Dv + columns) -> E (N, Hv, Dk, Dv), M (N, Hv, Dk, columns)
    E, M = final.split([Dv, columns], dim=-1)
    if beta is not None:
        return M, E
    per_channel = decay is not None and decay.dim() == 4
    return (M[..., 0] if per_channel else M[..., 0, 0]), E


def apply_segment(M: Tensor, E: Tensor, state: Tensor) -> Tensor:
    """M · state + E, (N, Hv, Dk, Dv): the state after the segment, given the one before."""
    return _times(M, state) + E


def compose_segments(
    second: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The map (M, E) of `first` followed by `second`."""
    (M2, E2), (M1, E1) = second, first
    M = _times(M2, M1) if M1.dim() == 4 else M2 * M1
    return M, apply_segment(M2, E2, E1)


def _times(M: Tensor, x: Tensor) -> Tensor:
    """M · x for a factor (N, Hv), a diagonal (N, Hv, Dk) or a matrix (N, Hv, Dk, Dk)."""
    if M.dim() == x.dim():
        with torch.autocast(device_kind(x), enabled=False):
            return M @ x
    return M.reshape(*M.shape, *(1,) * (x.dim() - M.dim())) * x
