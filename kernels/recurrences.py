"""The recurrences in steps, for a caller that learns late what enters a segment, or leaves it.

A segment is a sequence, or a fragment of one. Its outputs, and the state that it leaves, are affine
in the state S that enters it:

    o = o⁰ + R S        S_out = M S + E        (M and E: see `kernels.segments`)

so most of the op may be done before S is known. With do the gradient of o and dS_out that of S_out,
that of S is known before the op's backward pass, which then runs once:

    dS = Rᵀ do + Mᵀ dS_out

`forward` and `backward` are the op where states are known from the start. Where not, `begin` gives
M and E, and `finish` takes S; `begin_backward` gives Rᵀ do, and `finish_backward` takes dS_out.
Linear attention runs from states of zero and then adds R S. The scan has two levels, and waits
between them: it makes no R.

Shapes of N segments laid end to end: states and E (N, H, Dk, Dv); R (1, T, H, Dk), in the dtype in
which the backend multiplies; M as in `kernels.segments`. The diagonal scan has D heads with
states of 1 × 1. States are fp32 (fp64 for fp64 inputs). Nothing here is recorded by autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backend import Backend as ScanBackend
from kernels.backend import device_kind
from kernels.diagonal_scan import (
    scan_backward,
    scan_begin,
    scan_begin_backward,
    scan_finish,
    scan_finish_backward,
    scan_forward,
)
from kernels.linear_attention import Backend, check_arguments, resolve
from kernels.packing import accumulation_dtype

Kept = tuple[Tensor | None, ...]  # for a backward pass
Inputs = tuple[Any, ...]  # tensors of one recurrence, or None; (1, T, …), or (H,) if constant


class Packed(NamedTuple):
    """Segments laid end to end.

    Attributes:
        lengths: tokens of each, on the host.
        cu_seqlens: (N + 1,) int on the device, the same in cumulative form; None if N is 1.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor | None

    def rows(self) -> Iterator[slice]:
        """The rows of each segment."""
        end = 0
        for length in self.lengths:
            yield slice(end, end + length)
            end += length


class Shapes(NamedTuple):
    """Shapes of M and E of one segment."""

    M: torch.Size
    E: torch.Size


class Pass(NamedTuple):
    """Outputs, in the dtype of the inputs; the states that leave; and what `backward` needs."""

    o: Tensor
    state: Tensor
    kept: Kept


class Begun(NamedTuple):
    """M and E of segments, and what `finish` needs."""

    M: Tensor
    E: Tensor
    pending: tuple[Any, ...]


class Recurrence(ABC):
    """One of the recurrences, as functions of its inputs."""

    @abstractmethod
    def shapes(self, inputs: Inputs) -> Shapes:
        """Shapes of M and E of one segment, with all heads."""

    @abstractmethod
    def forward(self, inputs: Inputs, segments: Packed, state: Tensor | None) -> Pass:
        """The op from `state`, zeros if None."""

    @abstractmethod
    def backward(
        self,
        inputs: Inputs,
        segments: Packed,
        state: Tensor | None,
        kept: Kept,
        do: Tensor,
        dstate: Tensor | None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of the inputs, and of the states that entered, if any.

        Args:
            state: that entered; None is zeros.
            kept: what `forward` returned.
            do, dstate: gradients of the outputs and of the states that leave; None is zeros.
        """

    @abstractmethod
    def begin(self, inputs: Inputs, segments: Packed) -> Begun:
        """What of the op does not depend on the states that enter; most of it."""

    @abstractmethod
    def finish(
        self, inputs: Inputs, segments: Packed, begun: Begun, state: Tensor
    ) -> tuple[Tensor, Kept]:
        """The outputs from `state`, and what the backward pass needs. Overwrites `begun`."""

    @abstractmethod
    def begin_backward(
        self, inputs: Inputs, segments: Packed, kept: Kept, do: Tensor
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Rᵀ do, the gradient of the states that enter through the outputs alone, and what
        `finish_backward` needs.

        Args:
            kept: what `finish` returned.
        """

    @abstractmethod
    def finish_backward(
        self,
        inputs: Inputs,
        segments: Packed,
        state: Tensor,
        kept: Kept,
        do: Tensor,
        pending: tuple[Any, ...],
        dstate: Tensor,
    ) -> list[Tensor | None]:
        """Gradients of the inputs, given that of the states that leave."""


class LinearAttention(Recurrence):
    """`kernels.linear_attention`, of inputs (q, k, v, decay, beta)."""

    def __init__(self, scale: float | None = None, backend: Backend = "auto") -> None:
        self._scale, self._backend = scale, backend

    def _of(self, inputs: Inputs) -> tuple[Any, float]:
        """The module that computes it, and the factor on outputs."""
        q, _, v, *_ = inputs
        scale = q.shape[-1] ** -0.5 if self._scale is None else self._scale
        return resolve(self._backend, q, v), scale

    def shapes(self, inputs: Inputs) -> Shapes:
        q, k, v, decay, beta = inputs
        check_arguments(q, k, v, decay, beta, None, None)
        Dk, (Hv, Dv) = k.shape[3], v.shape[2:]
        per_channel = decay is not None and decay.dim() == 4
        M = (1, Hv, Dk, Dk) if beta is not None else (1, Hv, Dk) if per_channel else (1, Hv)
        return Shapes(torch.Size(M), torch.Size((1, Hv, Dk, Dv)))

    def forward(self, inputs: Inputs, segments: Packed, state: Tensor | None) -> Pass:
        backend, scale = self._of(inputs)
        return Pass(*backend.forward(*inputs, scale, state, segments.cu_seqlens))

    def backward(
        self,
        inputs: Inputs,
        segments: Packed,
        state: Tensor | None,
        kept: Kept,
        do: Tensor,
        dstate: Tensor | None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        backend, scale = self._of(inputs)
        *gradients, dentering = backend.backward(
            *inputs, scale, state, segments.cu_seqlens, kept, do, dstate
        )
        return gradients, dentering

    def begin(self, inputs: Inputs, segments: Packed) -> Begun:
        backend, scale = self._of(inputs)
        o, R, M, E, kept = backend.forward_with_maps(*inputs, scale, segments.cu_seqlens)
        return Begun(M, E, (o, R, kept))

    def finish(
        self, inputs: Inputs, segments: Packed, begun: Begun, state: Tensor
    ) -> tuple[Tensor, Kept]:
        backend, _ = self._of(inputs)
        v, (o, R, kept) = inputs[2], begun.pending
        S = state.to(R.dtype)
        with torch.autocast(device_kind(v), enabled=False):
            for n, rows in enumerate(segments.rows()):
                # (t, H, Dk) -> (H, t, Dk), times (H, Dk, Dv), gives (H, t, Dv)
                into, reads = (x[0, rows].transpose(0, 1) for x in (o, R))
                if reads.dtype == o.dtype:
                    into.baddbmm_(reads, S[n])
                else:
                    into += reads @ S[n]
        o = o.to(v.dtype).contiguous()
        return o, (R, *backend.enter(v, segments.cu_seqlens, state, kept))

    def begin_backward(
        self, inputs: Inputs, segments: Packed, kept: Kept, do: Tensor
    ) -> tuple[Tensor, tuple[Any, ...]]:
        R = kept[0]
        assert R is not None
        do = do.to(R.dtype)
        with torch.autocast(device_kind(R), enabled=False):
            # (t, H, Dk) -> (H, Dk, t), times (t, H, Dv) -> (H, t, Dv), gives (H, Dk, Dv)
            parts = [
                R[0, rows].permute(1, 2, 0) @ do[0, rows].transpose(0, 1)
                for rows in segments.rows()
            ]
        return torch.stack(parts).to(accumulation_dtype(R.dtype)), ()

    def finish_backward(
        self,
        inputs: Inputs,
        segments: Packed,
        state: Tensor,
        kept: Kept,
        do: Tensor,
        pending: tuple[Any, ...],
        dstate: Tensor,
    ) -> list[Tensor | None]:
        return self.backward(inputs, segments, state, kept[1:], do, dstate)[0]


class DiagonalScan(Recurrence):
    """`kernels.diagonal_scan`, of inputs (x, decay)."""

    def __init__(self, backend: ScanBackend = "auto") -> None:
        self._backend = backend

    def shapes(self, inputs: Inputs) -> Shapes:
        D = inputs[0].shape[2]
        return Shapes(torch.Size((1, D)), torch.Size((1, D, 1, 1)))

    def forward(self, inputs: Inputs, segments: Packed, state: Tensor | None) -> Pass:
        S = None if state is None else state[..., 0, 0]  # (N, D, 1, 1) -> (N, D)
        x, decay = inputs
        h, final = scan_forward(x, decay, S, segments.cu_seqlens, self._backend)
        return Pass(h, final[..., None, None], (h,))

    def backward(
        self,
        inputs: Inputs,
        segments: Packed,
        state: Tensor | None,
        kept: Kept,
        do: Tensor,
        dstate: Tensor | None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        S, dfinal = (None if x is None else x[..., 0, 0] for x in (state, dstate))
        (h,), (_, decay) = kept, inputs
        assert h is not None
        dx, ddecay, dentering = scan_backward(
            h, decay, S, segments.cu_seqlens, do, dfinal, self._backend
        )
        return [dx, ddecay], None if dentering is None else dentering[..., None, None]

    def begin(self, inputs: Inputs, segments: Packed) -> Begun:
        x, decay = inputs
        M, E, begun = scan_begin(x, decay, *segments, self._backend)
        return Begun(M, E[..., None, None], tuple(begun))

    def finish(
        self, inputs: Inputs, segments: Packed, begun: Begun, state: Tensor
    ) -> tuple[Tensor, Kept]:
        (x, decay), S = inputs, state[..., 0, 0]
        h = scan_finish(x, decay, *segments, begun.pending, S, self._backend)
        return h, (h,)

    def begin_backward(
        self, inputs: Inputs, segments: Packed, kept: Kept, do: Tensor
    ) -> tuple[Tensor, tuple[Any, ...]]:
        dS, begun = scan_begin_backward(inputs[1], *segments, do, self._backend)
        return dS[..., None, None], tuple(begun)

    def finish_backward(
        self,
        inputs: Inputs,
        segments: Packed,
        state: Tensor,
        kept: Kept,
        do: Tensor,
        pending: tuple[Any, ...],
        dstate: Tensor,
    ) -> list[Tensor | None]:
        (h,), (_, decay) = kept, inputs
        assert h is not None
        S, dfinal = state[..., 0, 0], dstate[..., 0, 0]
        return [*scan_finish_backward(h, decay, *segments, S, pending, do, dfinal, self._backend)]
