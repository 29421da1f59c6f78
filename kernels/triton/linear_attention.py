"""The Triton backend of `kernels.linear_attention`: chunk kernels, forward and backward.

Five kernels serve every decay (none, head, scalar, vector), with or without the delta rule:

    intra_chunk       A, weights of pairs of tokens in a chunk, and Z, the delta rule solved
    forward_chunks    the state from chunk to chunk, and the outputs
    backward_chunks   the state's gradient from the last chunk to the first; dv, dβ
    pair_gradients    the gradients of A and of K (`intra.py`), each chunk by itself
    gradients         dq, dk and the decay's gradient, each chunk by itself

For the backward pass the op keeps its inputs and what is expensive to compute again. With e bytes a
number (2 for bf16, else 4), a token and value head keep 64 e bytes of Z with the delta rule (its
rows are solved one after the other) and 64 e bytes of A with a vector decay (up to six products
for one). States (2 Dk Dv e / 64 with their gradients) and errors (Dv e) are computed again, which
takes less than the traffic of keeping them would; they exist while the backward pass runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.triton import backward, forward, intra
from kernels.triton.launch import (
    Blocks,
    architecture,
    blocks,
    launch,
    precision,
)
from kernels.triton.layout import Layout, lay_out
from kernels.triton.tiles import CHUNK, NONE, SCALAR, VECTOR


class Problem(NamedTuple):
    """The op's inputs as the kernels read them: contiguous, all batch rows end to end,
    (B, T, …) -> (tokens, …) with tokens = B · T."""

    q: Tensor | None  # (tokens, Hk, Dk); None where no output is wanted
    k: Tensor  # (tokens, Hk, Dk)
    v: Tensor  # (tokens, Hv, Dv)
    decay: Tensor | None  # (tokens, Hv), or (tokens, Hv, Dk)
    beta: Tensor | None  # (tokens, Hv)
    kind: int  # of decay: NONE, SCALAR or VECTOR of `tiles`
    scale: float
    Hv: int
    DV: int
    layout: Layout
    packed: bool  # with `cu_seqlens`: some rows may belong to no sequence

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype of stored intermediates: that in which they are multiplied."""
        return torch.bfloat16 if self.k.dtype == torch.bfloat16 else torch.float32

    def choices(self, kernel: str) -> tuple[Blocks, dict[str, Any]]:
        """A kernel's block widths, and the compile-time arguments that all kernels have."""
        DK, arch = self.k.shape[2], architecture(self.k.device)
        chosen = blocks(kernel, arch, self.k.dtype, DK, self.DV, self.kind == VECTOR.value)
        constants = {
            "DK": DK,
            "KIND": self.kind,
            "PRECISION": precision(self.k.dtype, arch),
            "BLOCK_K": chosen.BLOCK_K,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        }
        return chosen, constants

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def result(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor for a result of the op, zeros where a row belongs to no sequence."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=dtype, device=self.k.device)


def make_problem(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Problem:
    """The problem of the op's arguments, (B, T, …)."""
    B, T = k.shape[:2]
    Hv, DV = v.shape[2:]

    def rows(x: Tensor) -> Tensor:
        return x.reshape(B * T, *x.shape[2:]).contiguous()

    layout = lay_out(B, T, cu_seqlens, k.device)
    kind = NONE
    if decay is not None:
        kind = VECTOR if decay.dim() == 4 else SCALAR
        # (Hv,) -> (B, T, Hv): a decay a head is repeated for each token, 4 bytes beside hundreds
        # of q, k and v. So there is no kernel for it.
        decay = rows(decay.expand(B, T, Hv) if decay.dim() == 1 else decay)
    return Problem(
        None if q is None else rows(q), rows(k), rows(v), decay,
        None if beta is None else rows(beta), kind.value, scale, Hv, DV, layout,
        cu_seqlens is not None,
    )  # fmt: skip


class Intra(NamedTuple):
    """What the passes over a sequence read of q, k and the decay.

    With a vector decay q_read, k_read and k_written have it multiplied in, (tokens, Hv, Dk); else
    they are the op's q and k.
    """

    q_read: Tensor | None  # q as it reads the state; None without outputs
    k_read: Tensor | None  # k as it reads the state; of a vector decay None without β
    k_written: Tensor  # k as it writes the state
    decay: Tensor | None  # the op's; of a vector decay its sum over each chunk, (slots, Hv, Dk)
    A: Tensor | None  # (tokens, Hv, C); None without outputs
    Z: Tensor | None  # (tokens, Hv, C); None without β


def run_intra(p: Problem, A: Tensor | None = None, Z: Tensor | None = None) -> Intra:
    """Launch `intra_chunk` for what the problem needs, except A and Z where they are given."""
    tokens, Hk, DK = p.k.shape
    _, constants = p.choices("intra")
    output, delta, vector = p.q is not None, p.beta is not None, p.kind == VECTOR.value

    def pairs(wanted: bool) -> Tensor | None:
        return p.empty(tokens, p.Hv, CHUNK.value, dtype=p.operand_dtype) if wanted else None

    def rows() -> Tensor:  # in the dtype of k, since a decay makes no number larger
        return p.empty(tokens, p.Hv, DK, dtype=p.k.dtype)

    A_made, Z_made = pairs(output and A is None), pairs(delta and Z is None)
    q_read = rows() if output and vector else p.q
    k_read = p.k if not vector else rows() if delta else None
    k_written = rows() if vector else p.k
    decay = p.decay
    if vector:
        decay = p.empty(len(p.layout.chunks), p.Hv, DK, dtype=torch.float32)
    if vector or A_made is not None or Z_made is not None:
        # The precision of `solve`, finer than that of other products: three tf32 products for one
        # of fp32, or fp64 where there is no tf32 or other products are fp32.
        tf32 = constants["PRECISION"] != "ieee" and architecture(p.k.device).startswith("sm_")
        launch(
            intra.intra_chunk, (len(p.layout.chunks), p.Hv),
            p.q, p.k, p.decay, None if Z_made is None else p.beta, A_made, Z_made,
            *((q_read, k_read, k_written, decay) if vector else [None] * 4),
            p.layout.chunks, Hk, p.Hv, SOLVE="tf32x3" if tf32 else "ieee", **constants,
        )  # fmt: skip
    made = [given if given is not None else new for given, new in ((A, A_made), (Z, Z_made))]
    return Intra(q_read, k_read, k_written, decay, *made)


def run_forward(
    p: Problem, made: Intra, initial_state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """o (tokens, Hv, Dv), None without q, and the final states (N, Hv, Dk, Dv)."""
    tokens, _, DK = p.k.shape
    o = None if p.q is None else p.result(tokens, p.Hv, p.DV, dtype=p.k.dtype)
    N = len(p.layout.first_chunks)
    final_state = p.empty(N, p.Hv, DK, p.DV, dtype=torch.float32)
    _launch_forward(p, made, initial_state, o, final_state, None, None)
    return o, final_state


def run_states(p: Problem, made: Intra, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute again, for the backward pass, the state that enters each chunk (slots, Hv, Dk, Dv)
    and the errors r (tokens, Hv, Dv)."""
    tokens, _, DK = p.k.shape
    N = len(p.layout.first_chunks)
    states = p.empty(len(p.layout.chunks), p.Hv, DK, p.DV, dtype=p.operand_dtype)
    errors = p.empty(tokens, p.Hv, p.DV, dtype=p.operand_dtype)
    final_state = p.empty(N, p.Hv, DK, p.DV, dtype=torch.float32)
    _launch_forward(p, made, initial_state, None, final_state, states, errors)
    return states, errors


def _launch_forward(
    p: Problem,
    made: Intra,
    initial_state: Tensor | None,
    o: Tensor | None,
    final_state: Tensor,
    states: Tensor | None,
    errors: Tensor | None,
) -> None:
    chosen, constants = p.choices("forward")
    N, Hv = final_state.shape[:2]
    launch(
        forward.forward_chunks, (-(-p.DV // chosen.BLOCK_V), Hv, N),
        made.q_read, made.k_read, made.k_written, p.v, made.decay, p.beta, made.A, made.Z,
        initial_state, o, final_state, states, errors,
        p.layout.bounds, p.layout.first_chunks, made.k_written.shape[1], Hv, p.scale,
        DV=p.DV, BLOCK_V=chosen.BLOCK_V, **constants,
    )  # fmt: skip


class Gradients(NamedTuple):
    q: Tensor | None
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor


def run_backward(
    p: Problem,
    initial_state: Tensor | None,
    A: Tensor | None,
    Z: Tensor | None,
    d_o: Tensor | None,
    d_final_state: Tensor | None,
) -> Gradients:
    """Gradients in the shapes of `Problem`; that of a decay a head has one number a token.

    dq and dk are summed over the value heads of a key head, and the parts of column blocks are
    summed, in a fixed order: the same inputs give the same bits.
    """
    tokens, Hk, DK = p.k.shape
    Hv, DV = p.Hv, p.DV
    N, slots = len(p.layout.first_chunks), len(p.layout.chunks)
    made = run_intra(p, A, Z)
    states, errors = run_states(p, made, initial_state)

    chosen, constants = p.choices("backward")
    column_blocks = -(-DV // chosen.BLOCK_V)
    d_v = p.result(tokens, Hv, DV, dtype=p.k.dtype)
    d_beta = None
    if p.beta is not None:
        d_beta = p.result(column_blocks, tokens, Hv, dtype=torch.float32)
    d_states = torch.empty_like(states)
    d_initial_state = p.empty(N, Hv, DK, DV, dtype=torch.float32)
    launch(
        backward.backward_chunks, (column_blocks, Hv, N),
        made.q_read, made.k_read, made.k_written, made.decay, p.beta, made.A, made.Z, errors,
        d_o, d_final_state, d_v, d_beta, d_states, d_initial_state,
        p.layout.bounds, p.layout.first_chunks, made.k_written.shape[1], Hv, tokens, p.scale,
        DV=DV, BLOCK_V=chosen.BLOCK_V, **constants,
    )  # fmt: skip

    chosen, constants = p.choices("pair_gradients")
    scalar = p.kind == SCALAR.value
    constants["KIND"] = p.kind if scalar else NONE.value
    d_crossed = p.result(tokens, Hv, dtype=torch.float32) if scalar else None
    dA = None if made.A is None else torch.empty_like(made.A)
    dK = None if made.Z is None else torch.empty_like(made.Z)
    launch(
        backward.pair_gradients, (slots, Hv),
        *((p.q, p.k, p.decay) if scalar else [None] * 3),
        p.beta, errors, d_o, d_v, dA, dK, d_crossed,
        p.layout.chunks, Hk, Hv, p.scale, DV=DV, BLOCK_V=chosen.BLOCK_V, **constants,
    )  # fmt: skip

    chosen, constants = p.choices("gradients")
    column_blocks = -(-DK // chosen.BLOCK_K)
    head_dtype = p.k.dtype if Hk == Hv else torch.float32
    d_q = None if p.q is None else p.result(tokens, Hv, DK, dtype=head_dtype)
    d_k = p.result(tokens, Hv, DK, dtype=head_dtype)
    d_decay = None
    if p.kind == VECTOR.value:
        d_decay = p.result(tokens, Hv, DK, dtype=torch.float32)
    elif p.kind != NONE.value:
        d_decay = p.result(column_blocks, tokens, Hv, dtype=torch.float32)
    launch(
        backward.gradients, (slots, Hv, column_blocks),
        p.q, p.k, p.decay, p.beta, errors, states, dA, dK, d_o, d_v, d_states,
        d_q, d_k, d_decay, p.layout.chunks, Hk, Hv, tokens, p.scale,
        DV=DV, BLOCK_V=chosen.BLOCK_V, **constants,
    )  # fmt: skip

    def over_group(x: Tensor) -> Tensor:
        # (tokens, Hv, Dk) -> (tokens, Hk, Hv / Hk, Dk) -> (tokens, Hk, Dk)
        return x if Hk == Hv else x.unflatten(1, (Hk, Hv // Hk)).sum(2).to(p.k.dtype)

    if d_decay is not None and d_crossed is not None:
        d_decay = d_decay.sum(0) + d_crossed
    return Gradients(
        None if d_q is None else over_group(d_q),
        over_group(d_k),
        d_v,
        d_decay,
        None if d_beta is None else d_beta.sum(0),
        d_initial_state,
    )


def _like(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A gradient (tokens, …) in the shape and dtype of its input x."""
    if gradient is None or x is None:
        return None
    if x.dim() == 1:  # a decay a head: (tokens, Hv) -> (Hv,)
        gradient = gradient.sum(0)
    return gradient.reshape(x.shape).to(x.dtype)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        if initial_state is not None:
            initial_state = initial_state.float().contiguous()
        p = make_problem(q, k, v, decay, beta, scale, cu_seqlens)
        made = run_intra(p)
        o, final_state = run_forward(p, made, initial_state)
        A = made.A if p.kind == VECTOR.value else None
        ctx.save_for_backward(q, k, v, decay, beta, initial_state, cu_seqlens, A, made.Z)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return None if o is None else o.reshape(v.shape), final_state

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, beta, initial_state, cu_seqlens, A, Z = ctx.saved_tensors
        d_o, d_final_state = (None if d is None else d.contiguous() for d in d_outputs)
        read = None if d_o is None else q
        p = make_problem(read, k, v, decay, beta, ctx.scale, cu_seqlens)
        g = run_backward(p, initial_state, None if read is None else A, Z, d_o, d_final_state)
        return (
            torch.zeros_like(q) if q is not None and g.q is None else _like(g.q, q),
            _like(g.k, k),
            _like(g.v, v),
            _like(g.decay, decay),
            _like(g.beta, beta),
            None,
            None if initial_state is None else g.initial_state,
            None,
        )


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
    """Compute `kernels.linear_attention` with Triton; bf16, fp16 or fp32."""
    o, final = _LinearAttention.apply(q, k, v, decay, beta, scale, initial_state, cu_seqlens)
    return o, final


def final_state(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The final states (N, Hv, Dk, Dv) in fp32, without outputs.

    The same kernels with everything for an output compiled away, forward and backward. With
    `initial_state` [0 | I] and values [v | 0] it is the map [E | M] of a segment
    (`kernels.segments`).
    """
    _, final = _LinearAttention.apply(None, k, v, decay, beta, 1.0, initial_state, cu_seqlens)
    final_state: Tensor = final
    return final_state
