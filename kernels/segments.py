"""What a run of tokens does to the state that enters it: S_out = M · S_in + E.

A segment is a sequence, or a fragment of one. M and E depend on its own tokens only, so they can be
computed before S_in is known, and maps of neighbours compose:
(M₂, E₂) ∘ (M₁, E₁) = (M₂M₁, M₂E₁ + E₂). M has the smallest shape that holds it:

    (N, Hv)          no decay, or one a head: a factor
    (N, Hv, Dk)      a decay a channel: a diagonal
    (N, Hv, Dk, Dk)  with the delta rule: a matrix

All is fp32 (fp64 for fp64 inputs), whatever the dtype of the tokens, and under autocast too, since
errors of bf16 maps would grow with every composition. `kernels.recurrences` makes M and E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import device_kind


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
