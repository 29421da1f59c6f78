"""Softmax and its gradient over the logits of a chunk of tokens.

    lse = log Σ_v exp z_v,   ce = lse − z_label,
    dz_v = softmax_v · (1 + 2 · z_loss · lse) − [v = label]

One program a row. Its first pass over the row keeps a running maximum and sum; the second writes
the gradient, in the dtype in which products will read it. So fp32 logits are read twice and written
once, where torch's operators read them four times and write them three times. A row whose label is
−100 gets zeros, so that the CPU needs no list of the others.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import DTYPES, Launch, launch, recording

IGNORED = tl.constexpr(-100)
# Columns of a row that its program holds at a time.
COLUMNS = 2048
NUM_WARPS = 8


@triton.jit(do_not_specialize=["V"])
def softmax(
    logits, labels, lse, ce, gradient, V, z_loss,
    GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    wanted = label != IGNORED
    column = tl.arange(0, COLUMNS)

    # Below every logit, and finite: a difference of two −∞ would be NaN.
    nothing = -3.0e38
    top = tl.full([COLUMNS], nothing, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, V, COLUMNS):
        mask = first + column < V
        z = tl.load(logits + row * V + first + column, mask=mask, other=nothing)
        higher = tl.maximum(top, z)
        mass = tl.where(mask, mass * tl.exp(top - higher) + tl.exp(z - higher), mass)
        top = higher
    best = tl.max(top, 0)
    normaliser = best + tl.log(tl.sum(mass * tl.exp(top - best), 0))
    chosen = tl.load(logits + row * V + label, mask=wanted, other=0.0)
    tl.store(lse + row, tl.where(wanted, normaliser, 0.0))
    tl.store(ce + row, tl.where(wanted, normaliser - chosen, 0.0))

    if GRADIENT:
        factor = tl.where(wanted, 1 + 2 * z_loss * normaliser, 0.0)
        for first in range(0, V, COLUMNS):
            mask = first + column < V
            z = tl.load(logits + row * V + first + column, mask=mask, other=nothing)
            dz = tl.exp(z - normaliser) * factor - tl.where(first + column == label, 1.0, 0.0)
            place = gradient + row * V + first + column
            tl.store(place, dz.to(gradient.dtype.element_ty), mask=mask)


def losses(
    logits: Tensor, labels: Tensor, z_loss: float, gradient: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """lse and ce (rows,) fp32 of logits (rows, V). If `gradient`, also dz (rows, V) in `dtype`,
    which overwrites the logits if that is theirs."""
    rows, V = logits.shape
    lse, ce = torch.empty(2, rows, dtype=torch.float32, device=logits.device).unbind()
    dz = torch.empty_like(logits, dtype=dtype) if gradient and dtype != logits.dtype else logits
    launch(
        softmax, (rows,), logits, labels, lse, ce, dz, V, z_loss,
        GRADIENT=gradient, COLUMNS=COLUMNS, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return lse, ce, dz


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """The kernel with and without the gradient, with its name."""
    logits = torch.empty(512, 65536, device="meta")
    labels = torch.empty(512, dtype=torch.int64, device="meta")
    for dtype in DTYPES:
        for gradient in (False, True):
            with recording(arch) as launches:
                losses(logits, labels, 1e-4, gradient, dtype)
            name = f"cross-entropy {str(dtype).removeprefix('torch.')}{' gradient' * gradient}"
            for launched in launches:
                yield name, launched
