"""The torch backend of `kernels.linear_attention`: chunks of 64 tokens, with its own backward.

Inside a chunk (rows q, k, v; S the entering state; prefix, suffix, total and the weighted
scores as in `kernels.chunk_decay`), with q already scaled:

    A = scores(q, k)                       R  = β(v − K̂ S),  K̂ = k·prefix
    P = strictly lower scores(k, k)        V' = (I + βP)⁻¹ R = U − W S       (without β: V' = v)
    o = (q·prefix) S + A V'                S' = total·S + (k·suffix)ᵀ V'

Only V' and S' wait for the chunk before; all else is done for a slab of chunks at once, small
enough for its temporaries to stay in cache. Chunks are ordered so that the s-th chunks of all
sequences stand side by side and take their step together (`_plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.chunk_decay import CHUNK, decay_in_chunks

SLAB = 64  # chunks times heads in a slab


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
    """Compute `kernels.linear_attention` chunk by chunk; time and memory are linear in T.

    In fp64 when q is fp64, else in fp32. Kept for the backward beside the inputs, in that
    precision, a token and head: CHUNK numbers of the inverse (with β), Dk·Dv / CHUNK of states.
    """
    B, T, _, _ = q.shape
    Hv = v.shape[2]
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(B, T, Hv)
    if decay is not None and decay.dim() == 3:
        decay = decay.unsqueeze(-1)
    ends = torch.arange(0, B * T + 1, max(T, 1)) if cu_seqlens is None else cu_seqlens.cpu().long()
    if cu_seqlens is None and T == 0:
        ends = torch.zeros(B + 1, dtype=torch.long)
    lengths = ends.diff()
    if ends[0] != 0 or ends[-1] > B * T or (lengths < 0).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most {T}, the tokens; got {cu_seqlens}"
        )
    plan = _plan(ends[:-1], lengths, max(1, SLAB // Hv), q.device)
    tokens = [None if x is None else x.flatten(0, 1) for x in (q, k, v, decay, beta)]
    o, final_state = _Chunked.apply(*tokens, initial_state, scale, plan)  # type: ignore[no-untyped-call]
    return o.view(v.shape), final_state


@dataclass(frozen=True)
class _Slab:
    """Consecutive chunks of the plan: where their tokens are, and how they follow each other."""

    rows: Tensor  # (chunks · C,) the token in each slot; a slot past its sequence repeats one
    empty: Tensor | None  # slots past the end of their sequence
    tokens: Tensor | None  # the others, where there are such slots
    steps: list[tuple[slice, slice]]  # (chunks in this slab, their sequences in plan order)


@dataclass(frozen=True)
class _Plan:
    order: Tensor  # (N,) sequences, those with most chunks first
    slabs: list[_Slab]
    covered: int  # tokens inside sequences


def _plan(starts: Tensor, lengths: Tensor, slab: int, device: torch.device) -> _Plan:
    """Cut sequences into chunks, ordered by step, then sequence: a step's sequences are a prefix."""
    counts, order = (
        (lengths + CHUNK - 1).div(CHUNK, rounding_mode="floor").sort(descending=True, stable=True)
    )
    sequence = torch.arange(len(counts)).repeat_interleave(counts)
    step = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    step, by_step = step.sort(stable=True)
    sequence = order[sequence[by_step]]
    slot = torch.arange(CHUNK)
    used = (lengths[sequence] - step * CHUNK).clamp(max=CHUNK)[:, None]
    rows = (starts[sequence] + step * CHUNK)[:, None] + slot.minimum(used - 1)
    empty = slot >= used

    steps: list[list[tuple[slice, slice]]] = []
    bounds: list[int] = []
    chunk = 0
    for width in torch.bincount(step).tolist():
        for first in range(0, width, slab):
            last = min(first + slab, width)
            if not steps or chunk + last - first - bounds[-1] > slab:
                steps.append([])
                bounds.append(chunk)
            here = chunk - bounds[-1]
            steps[-1].append((slice(here, here + last - first), slice(first, last)))
            chunk += last - first
    slabs = []
    for begin, end, these in zip(bounds, [*bounds[1:], chunk], steps, strict=True):
        gaps = empty[begin:end].flatten()
        holes = bool(gaps.any())
        slabs.append(
            _Slab(
                rows=rows[begin:end].flatten().to(device),
                empty=gaps.nonzero().squeeze(-1).to(device) if holes else None,
                tokens=(~gaps).nonzero().squeeze(-1).to(device) if holes else None,
                steps=these,
            )
        )
    return _Plan(order.to(device), slabs, int(lengths.sum()))


def _load(x: Tensor | None, slab: _Slab, heads: int, dtype: torch.dtype) -> Tensor | None:
    """The slab's rows of (tokens, H, ...) as (chunks, heads, C, ...): zero where no token is."""
    if x is None:
        return None
    rows = x.index_select(0, slab.rows).to(dtype)
    if slab.empty is not None:
        rows = rows.index_fill_(0, slab.empty, 0)
    rows = rows.unflatten(0, (-1, CHUNK)).transpose(1, 2)
    if rows.shape[1] != heads:
        return rows.repeat_interleave(heads // rows.shape[1], dim=1)
    return rows.contiguous()


def _store(x: Tensor, slab: _Slab, out: Tensor) -> None:
    """Write (chunks, heads, C, ...) to the slab's rows of `out`, summing the heads that share one."""
    heads = out.shape[1]
    if x.shape[1] != heads:
        x = x.unflatten(1, (heads, -1)).sum(2)
    x, rows = x.transpose(1, 2).flatten(0, 1), slab.rows
    if slab.tokens is not None:
        x, rows = x.index_select(0, slab.tokens), rows.index_select(0, slab.tokens)
    out.index_copy_(0, rows, x.to(out.dtype))


def _weigh(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


class _Chunked(torch.autograd.Function):
    """Tokens (T, H, ...), all sequences end to end; the plan says which is which."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        H, Dv = v.shape[1:]
        Dk = q.shape[2]
        if initial_state is None:
            state = torch.zeros(len(plan.order), H, Dk, Dv, dtype=dtype, device=q.device)
        else:
            state = initial_state.to(dtype)[plan.order]
        o = torch.empty_like(v) if plan.covered == len(v) else torch.zeros_like(v)
        kept = []
        for slab in plan.slabs:
            qs, ks, vs, xs, bs = (_load(x, slab, H, dtype) for x in (q, k, v, decay, beta))
            weights = decay_in_chunks(xs)
            W = inverse = None
            if bs is None:
                (A,) = weights.scores([qs * scale], ks)
                V = vs
            else:
                bs = bs.unsqueeze(-1)
                A, P = weights.scores([qs * scale, ks], ks)
                inverse = _inverse(P.mul_(bs))
                W = inverse @ (_weigh(ks, weights.prefix) * bs)
                V = inverse @ (vs * bs)
            states = _recur(state, slab, V, W, _weigh(ks, weights.suffix), weights.total)
            out = A @ V + (_weigh(qs, weights.prefix) * scale) @ states
            _store(out, slab, o)
            kept += [states, inverse]
        ctx.scale, ctx.plan = scale, plan
        ctx.save_for_backward(q, k, v, decay, beta, initial_state, *kept)
        ctx.set_materialize_grads(False)
        final_state = torch.empty_like(state)
        final_state[plan.order] = state
        return o, final_state

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, decay, beta, initial_state, *kept = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        H, Dv = v.shape[1:]
        Dk = q.shape[2]
        if do is None:
            do = torch.zeros_like(v)
        if dfinal is None:
            dstate = torch.zeros(len(plan.order), H, Dk, Dv, dtype=dtype, device=q.device)
        else:
            dstate = dfinal.to(dtype)[plan.order]
        whole = plan.covered == len(v)
        grads = [
            None if x is None else torch.empty_like(x) if whole else torch.zeros_like(x)
            for x in (q, k, v, decay, beta)
        ]
        dq, dk, dv, ddecay, dbeta = grads
        for slab in reversed(plan.slabs):
            inverse, states = kept.pop(), kept.pop()
            qs, ks, vs, xs, bs, dos = (_load(x, slab, H, dtype) for x in (q, k, v, decay, beta, do))
            qs *= scale
            weights = decay_in_chunks(xs)
            Q = _weigh(qs, weights.prefix)
            K = _weigh(ks, weights.suffix)
            W = None
            if bs is None:
                lefts = [qs]
                V = vs
            else:
                lefts = [qs, ks]
                bs = bs.unsqueeze(-1)
                K_in = _weigh(ks, weights.prefix)
                seen = vs - K_in @ states
                V = inverse @ (seen * bs)
                W = inverse @ (K_in * bs)
            scores = weights.scores(lefts, ks)
            dV = scores[0].mT @ dos
            dstates = _recur_back(dstate, slab, dV, W, K, weights.total, Q.mT @ dos)
            dK = V @ dstates.mT
            dQ = dos @ states.mT
            dscores = [(dos @ V.mT).tril_()]
            if bs is not None:
                dR = inverse.mT @ dV
                dP = (dR @ V.mT).tril_(-1).neg_()
                dbs = (dP * scores[1]).sum(-1) + (dR * seen).sum(-1)
                dscores.append(dP * bs)
                dV = dR * bs
                dK_in = (dV @ states.mT).neg_()
                _store(dbs, slab, dbeta)
            dlefts, dks, dxs = weights.scores_grad(dscores, lefts, ks)
            dqs = dlefts[0] + _weigh(dQ, weights.prefix)
            dks += _weigh(dK, weights.suffix)
            if bs is not None:
                dks += dlefts[1] + _weigh(dK_in, weights.prefix)
            if dxs is not None:
                dprefix = dQ * Q
                if bs is not None:
                    dprefix += dK_in * K_in
                total = (states * dstates).sum(-1, keepdim=True).mT * weights.total
                dprefix[..., -1:, :] += total
                _store(dxs + weights.edges_grad(dprefix, dK * K), slab, ddecay)
            _store(dqs * scale, slab, dq)
            _store(dks, slab, dk)
            _store(dV, slab, dv)
        dinitial = None
        if initial_state is not None and ctx.needs_input_grad[5]:
            dinitial = torch.empty_like(initial_state)
            dinitial[plan.order] = dstate.to(dinitial.dtype)
        return dq, dk, dv, ddecay, dbeta, dinitial, None, None


def _inverse(strict: Tensor) -> Tensor:
    """(I + L)⁻¹ for the strictly lower part L of each (C, C) matrix."""
    identity = torch.eye(CHUNK, dtype=strict.dtype, device=strict.device)
    return torch.linalg.solve_triangular(
        strict, identity.expand_as(strict), upper=False, unitriangular=True
    )


def _recur(
    state: Tensor, slab: _Slab, V: Tensor, W: Tensor | None, K: Tensor, total: Tensor | None
) -> Tensor:
    """Step `state` through the slab's chunks; returns the states that enter them.

    V' = V − W S overwrites V, and S ← total·S + Kᵀ V'.
    """
    chunks, H, _, Dk = K.shape
    states = torch.empty(chunks, H, Dk, V.shape[-1], dtype=K.dtype, device=K.device)
    for here, sequences in slab.steps:
        S = state[sequences]
        states[here] = S
        flat, v = S.flatten(0, 1), V[here].flatten(0, 1)
        if W is not None:
            v.baddbmm_(W[here].flatten(0, 1), flat, alpha=-1)
        if total is not None:
            S *= total[here].mT
        flat.baddbmm_(K[here].flatten(0, 1).mT, v)
    return states


def _recur_back(
    dstate: Tensor,
    slab: _Slab,
    dV: Tensor,
    W: Tensor | None,
    K: Tensor,
    total: Tensor | None,
    read: Tensor,
) -> Tensor:
    """Step `dstate` back through the slab; returns the gradients of the states that leave its chunks.

    dV' = dV + K dS overwrites dV, and dS ← total·dS + read − Wᵀ dV'.
    """
    dstates = torch.empty_like(read)
    for here, sequences in reversed(slab.steps):
        dS = dstate[sequences]
        dstates[here] = dS
        flat, dv = dS.flatten(0, 1), dV[here].flatten(0, 1)
        dv.baddbmm_(K[here].flatten(0, 1), flat)
        if total is not None:
            dS *= total[here].mT
        dS += read[here]
        if W is not None:
            flat.baddbmm_(W[here].flatten(0, 1).mT, dv, alpha=-1)
    return dstates
