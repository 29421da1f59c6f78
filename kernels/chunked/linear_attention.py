"""The torch backend of `kernels.linear_attention`: chunk by chunk, with its own backward.

What a chunk computes is in `kernels.chunked.terms`. Only its V' and the state that leaves it depend
on the chunk before; all else is computed for a *slab*, many chunks at once
(`kernels.chunked.plan`). The backward pass takes the slabs from the last to the first, each from
the state that entered it: these states are all that is kept beside the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import device_kind
from kernels.chunked.decay import CHUNK, exp
from kernels.chunked.plan import Plan, Slab, make_plan
from kernels.chunked.terms import Terms
from kernels.packing import accumulation_dtype, gradient_like, host_bounds

# Tokens times heads in a slab. A temporary of 64 channels then has 1 MB in fp32, which a core's
# cache holds.
SLAB = 4096

Kept = tuple[Tensor, ...]  # states for the backward pass


class _Inputs(NamedTuple):
    """The op's inputs, all batch rows end to end: (B, T, H, D) -> (tokens, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None  # (tokens, Hv, 1 | Dk)
    beta: Tensor | None  # (tokens, Hv, 1)
    scale: float
    plan: Plan

    def terms(self, slab: Slab, columns: int = 0) -> Terms:
        return Terms(slab, self.q, self.k, self.v, self.decay, self.beta, self.scale, columns)


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> _Inputs:
    B, T, Hv, _ = v.shape
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(B, T, Hv)  # (Hv,) -> (B, T, Hv)
    if decay is not None and decay.dim() == 3:
        decay = decay.unsqueeze(-1)  # (B, T, Hv) -> (B, T, Hv, 1)
    if beta is not None:
        beta = beta.unsqueeze(-1)  # (B, T, Hv) -> (B, T, Hv, 1)
    decay, beta = (None if x is None else x.flatten(0, 1) for x in (decay, beta))
    q, k, rows = (x.flatten(0, 1) for x in (q, k, v))
    return _Inputs(q, k, rows, decay, beta, scale, _plan(v, cu_seqlens))


def _plan(v: Tensor, cu_seqlens: Tensor | None) -> Plan:
    B, T, Hv, _ = v.shape
    return make_plan(tuple(host_bounds(B, T, cu_seqlens)), max(1, SLAB // (CHUNK * Hv)), v.device)


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
    """Compute `kernels.linear_attention` in chunks; shapes as there, time and memory linear in T.

    All products are fp64 when q is fp64, else fp32. The backward keeps the inputs and the state
    that enters each slab: for a long sequence in fp32 4·Dk·Dv·Hv² / SLAB bytes a token (64 bytes at
    Hv = 4, Dk = Dv = 64), for short ones at most a state a chunk.

    Returns:
        o; the final state; and those states, for `backward`.
    """
    x = _inputs(q, k, v, decay, beta, scale, cu_seqlens)
    o = _rows_like(x.v, x.plan)
    state = _states(initial_state, x)
    entered = []
    with torch.autocast(device_kind(v), enabled=False):
        for slab in x.plan.slabs:
            # (sequences, H, Dk, Dv) -> (sequences · H, Dk, Dv), here and below
            entered.append(state[slab.sequences].flatten(0, 1).clone())
            terms = x.terms(slab)
            states = terms.recur(state[slab.sequences].flatten(0, 1))
            slab.store(terms.outputs(states), o)
    return o.view(v.shape), _by_sequence(state, x.plan), tuple(entered)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entered: Kept,
    do: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and the initial state, in the shapes of the inputs.

    Args:
        initial_state: is not read: it is in `entered`.
        entered: what `forward` or `enter` returned.
        do, dfinal: gradients of o and of the final state; None is zeros.
    """
    x = _inputs(q, k, v, decay, beta, scale, cu_seqlens)
    do = torch.zeros_like(x.v) if do is None else do.flatten(0, 1)
    given = (x.q, x.k, x.v, x.decay, x.beta)
    results = [None if one is None else _rows_like(one, x.plan) for one in given]
    dstate = _states(dfinal, x)
    with torch.autocast(device_kind(v), enabled=False):
        for slab, state in zip(reversed(x.plan.slabs), reversed(entered), strict=True):
            gradients = x.terms(slab).gradients(state, dstate[slab.sequences].flatten(0, 1), do)
            for out, slots in zip(results, gradients, strict=True):
                if out is not None and slots is not None:
                    slab.store(slots, out)
    inputs = (q, k, v, decay, beta)
    found = [gradient_like(one, like) for one, like in zip(results, inputs, strict=True)]
    return *found, _by_sequence(dstate, x.plan)


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

    With the delta rule R and M are Dk more columns of the state, which begin as the identity and to
    which no values are written: what does not depend on the state is computed once for all columns.
    Without it channels of keys do not mix, and R and M are products with decays.

    Returns:
        o⁰ (B, T, Hv, Dv) and R (B, T, Hv, Dk), where o = o⁰ + R S; M in a shape of
        `kernels.segments` and E (N, Hv, Dk, Dv), where S_out = M S + E; all in the dtype of states.
        And what `enter` needs.
    """
    x = _inputs(q, k, v, decay, beta, scale, cu_seqlens)
    (tokens, H, Dv), Dk = x.v.shape, k.shape[-1]
    columns = 0 if beta is None else Dk
    state = F.pad(_states(None, x), (0, columns))  # (N, H, Dk, Dv + columns)
    if columns:
        state[..., Dv:].diagonal(dim1=-2, dim2=-1).fill_(1)
    # The log of what is left of each channel of S without the delta rule: (N, H, 1, 1 | Dk).
    log_left = state.new_zeros(*state.shape[:2], 1, 1 if x.decay is None else x.decay.shape[-1])
    o, R = (_rows_like(state.new_empty(()).expand(tokens, H, D), x.plan) for D in (Dv, Dk))
    entered, maps = [], []
    with torch.autocast(device_kind(v), enabled=False):
        for slab in x.plan.slabs:
            entering = state[slab.sequences].flatten(0, 1)
            log_entering = log_left[slab.sequences].flatten(0, 1)
            entered.append(entering[..., :Dv].clone())
            maps.append(entering[..., Dv:].clone() if columns else exp(log_entering.mT.clone()))
            terms = x.terms(slab, columns)
            outputs = terms.outputs(terms.recur(entering))
            slab.store(outputs[..., :Dv], o)
            reads = outputs[..., Dv:] if columns else terms.decayed_reads(log_entering)
            slab.store(reads, R)
    E, M = _by_sequence(state, x.plan).split([Dv, columns], dim=-1)
    if not columns:
        M = exp(_by_sequence(log_left, x.plan)).squeeze(-2)  # (N, H, 1 | Dk)
        M = M if decay is not None and decay.dim() == 4 else M.squeeze(-1)
    rows = v.shape[:3]
    return o.view(*rows, Dv), R.view(*rows, Dk), M.contiguous(), E.contiguous(), (*entered, *maps)


def enter(v: Tensor, cu_seqlens: Tensor | None, state: Tensor, kept: Kept) -> Kept:
    """What `backward` needs after `forward_with_maps`, once the states that enter are known.

    Args:
        state: (N, Hv, Dk, Dv).
        kept: of `forward_with_maps`: for each slab the state that entered it, from a state of zero;
            and for each slab the map from the state that enters the sequence to it.
    """
    plan = _plan(v, cu_seqlens)
    state = state.index_select(0, plan.order)
    entered = []
    with torch.autocast(device_kind(v), enabled=False):
        for slab, zero, M in zip(
            plan.slabs, kept[: len(plan.slabs)], kept[len(plan.slabs) :], strict=True
        ):
            S = state[slab.sequences].flatten(0, 1)
            square = M.shape[-1] == M.shape[-2] == S.shape[-2]
            entered.append(torch.baddbmm(zero, M, S) if square else torch.addcmul(zero, M, S))
    return tuple(entered)


def _rows_like(x: Tensor, plan: Plan) -> Tensor:
    """An empty tensor like x, one row a token, with zeros if some rows belong to no sequence."""
    make = torch.empty_like if plan.tokens_in_sequences == len(x) else torch.zeros_like
    return make(x, memory_format=torch.contiguous_format)


def _states(x: Tensor | None, inputs: _Inputs) -> Tensor:
    """A copy of the states x (N, H, Dk, Dv) in the order of the plan; zeros for None."""
    dtype, order = accumulation_dtype(inputs.k.dtype), inputs.plan.order
    if x is None:
        N, (H, Dv), Dk = len(order), inputs.v.shape[1:], inputs.k.shape[-1]
        return torch.zeros(N, H, Dk, Dv, dtype=dtype, device=inputs.k.device)
    return x.to(dtype).index_select(0, order)


def _by_sequence(x: Tensor, plan: Plan) -> Tensor:
    """(N, …) in the order of the plan -> in the order of the sequences."""
    return torch.empty_like(x).index_copy_(0, plan.order, x)
