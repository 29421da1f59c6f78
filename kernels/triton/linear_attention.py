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
import torch.nn.functional as F
from torch import Tensor

from kernels.packing import gradient_like
from kernels.triton.backward import backward_chunks, gradients, pair_gradients
from kernels.triton.forward import forward_chunks
from kernels.triton.intra import intra_chunk
from kernels.triton.launch import (
    Blocks,
    architecture,
    blocks,
    launch,
    precision,
)
from kernels.triton.layout import Layout, lay_out
from kernels.triton.tiles import CHUNK, FORGET_ALL, NONE, SCALAR, VECTOR


class Problem(NamedTuple):
    """The op's inputs as the kernels read them: contiguous, all batch rows end to end,
    (B, T, …) -> (tokens, …) with tokens = B · T."""

    q: Tensor | None  # (tokens, Hk, Dk); None in a backward pass from the final state alone
    k: Tensor  # (tokens, Hk, Dk)
    v: Tensor  # (tokens, Hv, Dv)
    decay: Tensor | None  # (tokens, Hv), or (tokens, Hv, Dk)
    beta: Tensor | None  # (tokens, Hv)
    kind: int  # of decay: NONE, SCALAR or VECTOR of `tiles`
    scale: float
    Hv: int
    DV: int  # columns of the state
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
            intra_chunk, (len(p.layout.chunks), p.Hv),
            p.q, p.k, p.decay, None if Z_made is None else p.beta, A_made, Z_made,
            *((q_read, k_read, k_written, decay) if vector else [None] * 4),
            p.layout.chunks, Hk, p.Hv, SOLVE="tf32x3" if tf32 else "ieee", **constants,
        )  # fmt: skip
    made = [given if given is not None else new for given, new in ((A, A_made), (Z, Z_made))]
    return Intra(q_read, k_read, k_written, decay, *made)


def run_forward(
    p: Problem, made: Intra, initial_state: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """o (tokens, Hv, Dv) in `dtype` (of k unless given) and the final states (N, Hv, Dk, Dv)."""
    tokens, _, DK = p.k.shape
    o = p.result(tokens, p.Hv, p.DV, dtype=dtype or p.k.dtype)
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
        forward_chunks, (-(-p.DV // chosen.BLOCK_V), Hv, N),
        made.q_read, made.k_read, made.k_written, p.v, made.decay, p.beta, made.A, made.Z,
        initial_state, o, final_state, states, errors,
        p.layout.bounds, p.layout.first_chunks, made.k_written.shape[1], Hv, p.scale,
        DV=p.DV, VALUES=p.v.shape[2], BLOCK_V=chosen.BLOCK_V, **constants,
    )  # fmt: skip


def run_backward(
    p: Problem,
    initial_state: Tensor | None,
    A: Tensor | None,
    Z: Tensor | None,
    d_o: Tensor | None,
    d_final_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and the initial state, in the shapes of `Problem`; that of
    a decay a head has one number a token.

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
        backward_chunks, (column_blocks, Hv, N),
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
        pair_gradients, (slots, Hv),
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
        gradients, (slots, Hv, column_blocks),
        p.q, p.k, p.decay, p.beta, errors, states, dA, dK, d_o, d_v, d_states,
        d_q, d_k, d_decay, p.layout.chunks, Hk, Hv, tokens, p.scale,
        DV=DV, BLOCK_V=chosen.BLOCK_V, **constants,
    )  # fmt: skip

    def over_group(x: Tensor) -> Tensor:
        # (tokens, Hv, Dk) -> (tokens, Hk, Hv / Hk, Dk) -> (tokens, Hk, Dk)
        return x if Hk == Hv else x.unflatten(1, (Hk, Hv // Hk)).sum(2).to(p.k.dtype)

    if d_decay is not None and d_crossed is not None:
        d_decay = d_decay.sum(0) + d_crossed
    return (
        None if d_q is None else over_group(d_q),
        over_group(d_k),
        d_v,
        d_decay,
        None if d_beta is None else d_beta.sum(0),
        d_initial_state,
    )


Kept = tuple[Tensor | None, Tensor | None]  # A and Z, for the backward pass


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Kept]:
    """Compute `kernels.linear_attention` with Triton; bf16, fp16 or fp32.

    Returns:
        o; the final state in fp32; and what `backward` needs.
    """
    p = make_problem(q, k, v, decay, beta, scale, cu_seqlens)
    made = run_intra(p)
    o, final_state = run_forward(p, made, _as_state(initial_state))
    A = made.A if p.kind == VECTOR.value else None
    return o.reshape(v.shape), final_state, (A, made.Z)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Kept,
    d_o: Tensor | None,
    d_final_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and the initial state, in the shapes of the inputs.

    Args:
        kept: what `forward` returned.
        d_o, d_final_state: gradients of o and of the final state; None is zeros.
    """
    read = None if d_o is None else q
    p = make_problem(read, k, v, decay, beta, scale, cu_seqlens)
    A, Z = kept
    d_o, d_final_state = (None if d is None else d.contiguous() for d in (d_o, d_final_state))
    *found, d_initial_state = run_backward(
        p, _as_state(initial_state), None if read is None else A, Z, d_o, d_final_state
    )
    d_inputs = [gradient_like(d, x) for d, x in zip(found, (q, k, v, decay, beta), strict=True)]
    if read is None:
        d_inputs[0] = torch.zeros_like(q)
    return *d_inputs, d_initial_state


def forward_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Kept]:
    """The pass from states of zero, and what states S that enter later change.

    With the delta rule R and M are Dk more columns of the state, in the same launches; without it
    they are products with decays. A is kept too: 64 numbers a token and head of one fragment.

    Returns:
        o⁰ (B, T, Hv, Dv) in fp32 and R (B, T, Hv, Dk) in the dtype of products, where o = o⁰ + R S;
        M in a shape of `kernels.segments` and E (N, Hv, Dk, Dv) in fp32, where S_out = M S + E; and
        what `enter` needs.
    """
    p = make_problem(q, k, v, decay, beta, scale, cu_seqlens)
    DK, DV = k.shape[3], p.DV
    state = None
    if beta is not None:
        p = p._replace(DV=DV + DK)
        state = torch.eye(DK, DV + DK, device=k.device).roll(DV, 1)  # (Dk, Dv + Dk): [0 | I]
        state = state.expand(len(p.layout.first_chunks), p.Hv, -1, -1).contiguous()
    made = run_intra(p)
    o, E = run_forward(p, made, state, torch.float32)
    assert o is not None
    o = o.unflatten(0, v.shape[:2])
    if beta is None:
        R, M = decayed_reads(q, decay, scale, p)
    else:
        (o, R), (E, M) = (x.split([DV, DK], dim=3) for x in (o, E))
    return o, R.to(p.operand_dtype).contiguous(), M.contiguous(), E.contiguous(), (made.A, made.Z)


def decayed_reads(
    q: Tensor, decay: Tensor | None, scale: float, p: Problem
) -> tuple[Tensor, Tensor]:
    """R (B, T, Hv, Dk) and M (N, Hv) or (N, Hv, Dk), without the delta rule: products with the
    decays from the first row of each sequence."""
    B, T, Hk, _ = q.shape
    bounds = p.layout.bounds
    R = (scale * q).repeat_interleave(p.Hv // Hk, dim=2)
    if p.decay is None:
        return R, torch.ones(len(bounds) - 1, p.Hv, device=q.device)
    # Differences of sums over all rows, in fp64; (B · T + 1, Hv, 1 | Dk)
    steps = p.decay.reshape(B * T, p.Hv, -1).clamp(min=FORGET_ALL.value)
    total = F.pad(steps.cumsum(0, dtype=torch.float64), (0, 0, 0, 0, 1, 0))
    row = torch.arange(B * T, device=q.device)
    sequence = torch.searchsorted(bounds[1:], row, right=True).clamp(max=len(bounds) - 2)
    left = (total[1:] - total[bounds[sequence]]).float().exp()
    M = (total[bounds[1:]] - total[bounds[:-1]]).float().exp()
    return R * left.unflatten(0, (B, T)), M if decay is not None and decay.dim() == 4 else M[..., 0]


def enter(v: Tensor, cu_seqlens: Tensor | None, state: Tensor, kept: Kept) -> Kept:
    """What `backward` needs after `forward_with_maps`: as before, since it is given the states."""
    return kept


def _as_state(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
