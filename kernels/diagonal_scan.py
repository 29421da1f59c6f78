"""The recurrence with an element-wise state (HGRN, Mamba-1, LSSL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import Backend, use_triton
from kernels.packing import Block, accumulation_dtype, blocks, check_cu_seqlens, host_bounds

# Elements of a block of rows, 1 MB in fp32. A block is read several times, so its decays and states
# should fit a core's second cache together.
BLOCK_ELEMENTS = 1 << 18


def diagonal_scan(
    x: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
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
        backend: "triton" (GPU), "torch" (any device), or "auto".

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
    B, _, D = x.shape
    N = check_cu_seqlens(B, cu_seqlens)
    if initial_state is not None and initial_state.shape != (N, D):
        raise ValueError(
            f"initial_state must be {(N, D)} for {N} sequences; got {tuple(initial_state.shape)}"
        )
    h, final_state = _DiagonalScan.apply(x, decay, initial_state, cu_seqlens, backend)
    return h, final_state if output_final_state else None


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        decay: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        h, state = scan_forward(x, decay, initial_state, cu_seqlens, backend)
        ctx.save_for_backward(decay, initial_state, cu_seqlens, h)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return h, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
        decay, initial_state, cu_seqlens, h = ctx.saved_tensors
        found = scan_backward(h, decay, initial_state, cu_seqlens, dh, dstate, ctx.backend)
        return *found, None, None


def scan_forward(
    x: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h and the final state of `diagonal_scan`, not recorded by autograd.

    In torch one cache-sized block of a sequence after the other, the state carried between them.
    """
    if use_triton(backend, x):
        from kernels.triton import diagonal_scan as compiled

        return compiled.forward(x, decay, initial_state, cu_seqlens)
    B, T, D = x.shape
    bounds = host_bounds(B, T, cu_seqlens)
    x, decay, dtype = x.reshape(B * T, D), decay.reshape(B * T, D), accumulation_dtype(x.dtype)
    h = torch.empty_like(x)
    h[bounds[-1] :] = 0
    if initial_state is None:
        state = torch.zeros(len(bounds) - 1, D, dtype=dtype, device=x.device)
    else:
        state = initial_state.to(dtype, copy=True)
    for n, start, end, _, _ in blocks(bounds, _rows(x)):
        local = _scanned(decay[start:end].to(dtype).exp(), x[start:end].to(dtype, copy=True))
        states = local.entered_by(state[n])
        h[start:end] = states
        state[n] = states[-1]
    return h.view(B, T, D), state


def scan_backward(
    h: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dh: Tensor | None,
    dfinal: Tensor | None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the decay and of the initial state, if there is one, in its dtype.

    g_t = dh_t + exp(decay_{t+1}) · g_{t+1}: the same scan from the other end.

    Args:
        h: what `scan_forward` returned.
        dh, dfinal: gradients of h and of the final state; None is zeros.
    """
    if use_triton(backend, h):
        from kernels.triton import diagonal_scan as compiled

        return compiled.backward(h, decay, initial_state, cu_seqlens, dh, dfinal)
    B, T, D = shape = h.shape
    bounds = host_bounds(B, T, cu_seqlens)
    h, decay, dtype = h.reshape(B * T, D), decay.reshape(B * T, D), accumulation_dtype(h.dtype)
    dh = None if dh is None else dh.reshape(B * T, D)
    dx, ddecay = torch.empty_like(h), torch.empty_like(decay)
    dx[bounds[-1] :] = 0
    ddecay[bounds[-1] :] = 0
    # (N, D): the gradient of each sequence's last state so far, from the rows after it.
    carried = torch.zeros(len(bounds) - 1, D, dtype=dtype, device=h.device)
    if dfinal is not None:
        carried += dfinal
    for block in reversed(list(blocks(bounds, _rows(h)))):
        n, start, end = block[:3]
        factor = decay[start:end].to(dtype).exp()
        arriving = torch.zeros_like(h[start:end]) if dh is None else dh[start:end]
        gradient = _scanned_back(factor, arriving).entered_by(carried[n]).flip(0)
        dx[start:end] = gradient
        gradient *= factor
        carried[n] = gradient[0]
        ddecay[start:end] = _times_before(gradient, block, h, initial_state)
    dstate = None if initial_state is None else carried.to(initial_state.dtype)
    return dx.view(shape), ddecay.view(shape), dstate


def _times_before(gradient: Tensor, block: Block, h: Tensor, state: Tensor | None) -> Tensor:
    """A block's rows of `gradient`, each times the row of h before it; in place."""
    n, start, end, first, _ = block
    gradient[1:] *= h[start : end - 1]
    before = h[start - 1] if not first else 0 if state is None else state[n]
    gradient[0] *= before
    return gradient


def scan_begin(
    x: Tensor,
    decay: Tensor,
    lengths: Sequence[int],
    cu_seqlens: Tensor | None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, list[Local]]:
    """The part of the scan that does not depend on the states that enter.

    Triton's kernels read x and decay for it, and again once the states are known: they keep nothing
    in between.

    Args:
        x, decay: (1, T, D), N segments laid end to end.
        lengths: tokens of each; none is empty.
        cu_seqlens: the same on the device; None if N is 1.

    Returns:
        M and E (N, D), where the states that leave are M · state + E; and what `scan_finish` needs.
    """
    dtype = accumulation_dtype(x.dtype)
    if use_triton(backend, x):
        from kernels.triton import diagonal_scan as compiled

        logs = [part.sum(0, dtype=dtype) for part in decay[0].split(list(lengths))]
        return torch.stack(logs).exp_(), compiled.ends(x, decay, cu_seqlens), []
    M, E = torch.ones(2, len(lengths), x.shape[2], dtype=dtype, device=x.device).unbind()
    E.zero_()
    begun = []
    for n, start, end, _, _ in _blocks_of(x, lengths):
        factor = decay[0, start:end].to(dtype).exp()
        begun.append(_scanned(factor, x[0, start:end].to(dtype, copy=True)))
        _compose(M[n], E[n], *begun[-1].ends())
    return M, E, begun


def scan_finish(
    x: Tensor,
    decay: Tensor,
    lengths: Sequence[int],
    cu_seqlens: Tensor | None,
    begun: Sequence[Local],
    initial_state: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """h (1, T, D) from the states that enter, (N, D). Overwrites `begun`."""
    if use_triton(backend, x):
        return scan_forward(x, decay, initial_state, cu_seqlens, backend)[0]
    h, state = torch.empty_like(x), initial_state.clone()
    for (n, start, end, _, _), local in zip(_blocks_of(x, lengths), begun, strict=True):
        states = local.entered_by(state[n])
        h[0, start:end] = states
        state[n] = states[-1]
    return h


def scan_begin_backward(
    decay: Tensor,
    lengths: Sequence[int],
    cu_seqlens: Tensor | None,
    dh: Tensor,
    backend: Backend = "auto",
) -> tuple[Tensor, list[tuple[Tensor, Local]]]:
    """The part of the backward pass that does not depend on gradients of states that leave.

    Returns:
        (N, D), the gradient of the states that enter, through h alone; and what
        `scan_finish_backward` needs.
    """
    if use_triton(backend, dh):
        from kernels.triton import diagonal_scan as compiled

        return compiled.starts(dh, decay, cu_seqlens), []
    dtype = accumulation_dtype(dh.dtype)
    dstate = torch.zeros(len(lengths), dh.shape[2], dtype=dtype, device=dh.device)
    begun = []
    for n, start, end, _, _ in reversed(_blocks_of(dh, lengths)):
        factor = decay[0, start:end].to(dtype).exp()
        local = _scanned_back(factor, dh[0, start:end])
        M, E = local.ends()
        dstate[n].mul_(M).add_(E).mul_(factor[0])
        begun.append((factor, local))
    return dstate, begun


def scan_finish_backward(
    h: Tensor,
    decay: Tensor,
    lengths: Sequence[int],
    cu_seqlens: Tensor | None,
    initial_state: Tensor,
    begun: Sequence[tuple[Tensor, Local]],
    dh: Tensor,
    dfinal: Tensor,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the decay, given those of the states that leave (N, D). Overwrites
    `begun`."""
    if use_triton(backend, h):
        return scan_backward(h, decay, initial_state, cu_seqlens, dh, dfinal, backend)[:2]
    dx, ddecay, carried = torch.empty_like(h), torch.empty_like(decay), dfinal.clone()
    for block, (factor, local) in zip(reversed(_blocks_of(h, lengths)), begun, strict=True):
        n, start, end = block[:3]
        gradient = local.entered_by(carried[n]).flip(0)
        dx[0, start:end] = gradient
        gradient *= factor
        carried[n] = gradient[0]
        ddecay[0, start:end] = _times_before(gradient, block, h[0], initial_state)
    return dx, ddecay


def _blocks_of(x: Tensor, lengths: Sequence[int]) -> list[Block]:
    return list(blocks([0, *accumulate(lengths)], _rows(x[0])))


def _compose(M: Tensor, E: Tensor, later_M: Tensor, later_E: Tensor) -> None:
    """The map (M, E) followed by a later one, in place."""
    M.mul_(later_M)
    E.mul_(later_M).add_(later_E)


def _rows(x: Tensor) -> int:
    return max(BLOCK_ELEMENTS // max(x.shape[1], 1), 1)


class Local(NamedTuple):
    """A scan over the rows of (L, D), L ≥ 1, up to the state that enters it.

    A prefix scan in two levels. The rows are cut into about √L chunks of √L rows. All chunks are
    scanned side by side, each from a state of zero, together with the products of their factors;
    then, chunk after chunk, the state that enters is added. Factors are at most 1 and nothing is
    divided by their products. (chunks, rows, D) each.
    """

    h: Tensor
    product: Tensor
    length: int  # L

    def entered_by(self, state: Tensor) -> Tensor:
        """The rows (L, D) of the scan from `state` (D,). Overwrites `h`."""
        for states, share in zip(self.h.unbind(0), self.product.unbind(0), strict=True):
            states.addcmul_(share, state)
            state = states[-1]
        return self.h.flatten(0, 1)[: self.length]

    def ends(self) -> tuple[Tensor, Tensor]:
        """(M, E), (D,) each: the last row of the scan from a state S is M S + E."""
        last = (self.length - 1) % self.h.shape[1]
        rows = [*zip(self.product[:-1, -1], self.h[:-1, -1], strict=True)]
        M, E = self.product[-1, last], self.h[-1, last]
        for product, h in reversed(rows):
            E, M = torch.addcmul(E, M, h), M * product
        return M, E


def _scanned(factor: Tensor, x: Tensor) -> Local:
    """h_t = factor_t · h_{t−1} + x_t over the rows of (L, D). Overwrites both."""
    L, D = x.shape
    rows = math.isqrt(L - 1) + 1
    chunks = -(-L // rows)
    pad = (0, 0, 0, chunks * rows - L)
    product = F.pad(factor, pad).view(chunks, rows, D)  # (L, D) -> (chunks, rows, D)
    h = F.pad(x, pad).view(chunks, rows, D)
    # Views made beforehand: indexing in the loop would take as long as the arithmetic.
    steps, factors = h.unbind(1), product.unbind(1)  # `rows` views of (chunks, D) each
    for t in range(1, rows):
        steps[t].addcmul_(factors[t], steps[t - 1])
        factors[t].mul_(factors[t - 1])
    return Local(h, product, L)


def _scanned_back(factor: Tensor, dh: Tensor) -> Local:
    """g_t = factor_{t+1} · g_{t+1} + dh_t over the rows of (L, D), the last row first; its state is
    the gradient that reaches the last row from later ones."""
    shifted = factor.roll(-1, 0).flip(0)
    shifted[0] = 1
    return _scanned(shifted, dh.flip(0).to(factor.dtype))
