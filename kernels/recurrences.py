"""The recurrences in steps, for a caller that learns late what enters a segment, or leaves it.

A segment is a sequence, or a fragment of one. Its outputs, and the state that it leaves, are affine
in the state S that enters it:

    o = o⁰ + R S        S_out = M S + E        (M and E: see `kernels.segments`)

so the op may run from states of zero before S is known. With do the gradient of o, and dS_out that
of S_out, the gradient of S is known before the op's backward pass, which then runs once:

    dS = Rᵀ do + Mᵀ dS_out

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
from kernels.chunked.decay import exp
from kernels.diagonal_scan import scan_backward, scan_forward
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


class Mapped(NamedTuple):
    """o⁰, R, M and E of segments, and what `enter` needs."""

    o: Tensor
    R: Tensor
    M: Tensor
    E: Tensor
    kept: Kept


class Recurrence(ABC):
    """One of the recurrences, as functions of its inputs."""

    @abstractmethod
    def shapes(self, inputs: Inputs) -> Shapes: ...

    @abstractmethod
    def forward(self, inputs: Inputs, segments: Packed, state: Tensor | None) -> Pass:
        """The op from `state`, zeros if None."""

    @abstractmethod
    def forward_with_maps(self, inputs: Inputs, segments: Packed) -> Mapped:
        """The op from states of zero, and the maps of the states that enter later."""

    @abstractmethod
    def enter(
        self, inputs: Inputs, segments: Packed, mapped: Mapped, state: Tensor
    ) -> tuple[Tensor, Kept]:
        """The outputs from `state`, and what `backward` needs. Overwrites `mapped.o`."""

    @abstractmethod
    def entering_gradient(self, segments: Packed, R: Tensor, do: Tensor) -> Tensor:
        """Rᵀ do: the gradient of the states that enter, through the outputs alone."""

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
            kept: what `forward` or `enter` returned.
            do, dstate: gradients of the outputs and of the states that leave; None is zeros.
        """


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

    def forward_with_maps(self, inputs: Inputs, segments: Packed) -> Mapped:
        backend, scale = self._of(inputs)
        return Mapped(*backend.forward_with_maps(*inputs, scale, segments.cu_seqlens))

    def enter(
        self, inputs: Inputs, segments: Packed, mapped: Mapped, state: Tensor
    ) -> tuple[Tensor, Kept]:
        backend, _ = self._of(inputs)
        v, o, S = inputs[2], mapped.o, state.to(mapped.R.dtype)
        with torch.autocast(v.device.type, enabled=False):
            for n, rows in enumerate(segments.rows()):
                # (t, H, Dk) -> (H, t, Dk), times (H, Dk, Dv), gives (H, t, Dv)
                into, R = (x[0, rows].transpose(0, 1) for x in (o, mapped.R))
                if R.dtype == o.dtype:
                    into.baddbmm_(R, S[n])
                else:
                    into += R @ S[n]
        o = o.to(v.dtype).contiguous()
        return o, backend.enter(v, segments.cu_seqlens, state, mapped.kept)

    def entering_gradient(self, segments: Packed, R: Tensor, do: Tensor) -> Tensor:
        do = do.to(R.dtype)
        with torch.autocast(R.device.type, enabled=False):
            # (t, H, Dk) -> (H, Dk, t), times (t, H, Dv) -> (H, t, Dv), gives (H, Dk, Dv)
            parts = [
                R[0, rows].permute(1, 2, 0) @ do[0, rows].transpose(0, 1)
                for rows in segments.rows()
            ]
        return torch.stack(parts).to(accumulation_dtype(R.dtype))

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

    def forward_with_maps(self, inputs: Inputs, segments: Packed) -> Mapped:
        x, decay = inputs
        dtype = accumulation_dtype(x.dtype)
        h, E = scan_forward(x.to(dtype), decay, None, segments.cu_seqlens, self._backend)
        R = torch.empty_like(h)
        for rows in segments.rows():
            torch.cumsum(decay[0, rows], dim=0, dtype=dtype, out=R[0, rows])
        R = exp(R)
        M = torch.stack([R[0, rows.stop - 1] for rows in segments.rows()])
        return Mapped(h, R.unsqueeze(-1), M, E[..., None, None], ())

    def enter(
        self, inputs: Inputs, segments: Packed, mapped: Mapped, state: Tensor
    ) -> tuple[Tensor, Kept]:
        h, R = mapped.o, mapped.R[..., 0]
        for n, rows in enumerate(segments.rows()):
            h[0, rows].addcmul_(R[0, rows], state[n, :, 0, 0])
        h = h.to(inputs[0].dtype)
        return h, (h,)

    def entering_gradient(self, segments: Packed, R: Tensor, do: Tensor) -> Tensor:
        products = R[0, :, :, 0] * do[0]  # (t, D)
        return torch.stack([products[rows].sum(0) for rows in segments.rows()])[..., None, None]

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
