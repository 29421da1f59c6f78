"""The torch backend of `kernels.linear_attention`: chunk by chunk, with its own backward.

Inside a chunk, with rows q (scaled already), k, v; S the state that enters, S' the one that leaves;
prefix, suffix, total and the weighted scores as in `kernels.chunked.decay`:

    A = scores(q, k)           Q = q·prefix     V' = (I + βP)⁻¹ β(v − K̂S) = U − W S
    P = scores(k, k), i > j    K̂ = k·prefix     o  = Q S + A V'
                               K = k·suffix     S' = total·S + Kᵀ V'

and V' = v without β. Only V' and S' depend on the chunk before. All else is computed for a *slab*,
many chunks at once (`kernels.chunked.plan`). The backward pass takes the slabs from the last to the
first, each from the state that entered it: these states are all that is kept beside the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import device_kind
from kernels.chunked.decay import CHUNK, NoDecay, decay_in_chunks
from kernels.chunked.plan import Plan, Slab, make_plan
from kernels.packing import accumulation_dtype, host_bounds

# Tokens times heads in a slab. A temporary of 64 channels then has 1 MB in fp32, which a core's
# cache holds.
SLAB = 4096


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
    """Compute `kernels.linear_attention` in chunks; shapes as there, time and memory linear in T.

    All products are fp64 when q is fp64, else fp32. The backward keeps the inputs and the state
    that enters each slab: for a long sequence in fp32 4·Dk·Dv·Hv² / SLAB bytes a token (64 bytes at
    Hv = 4, Dk = Dv = 64), for short ones at most a state a chunk.
    """
    o, final_state = _run(q, k, v, decay, beta, scale, initial_state, cu_seqlens)
    assert o is not None
    return o, final_state


def final_state(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The final states (N, Hv, Dk, Dv), without outputs."""
    return _run(None, k, v, decay, beta, 1.0, initial_state, cu_seqlens)[1]


def _run(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    B, T, Hv, _ = v.shape
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(B, T, Hv)  # (Hv,) -> (B, T, Hv)
    if decay is not None and decay.dim() == 3:
        decay = decay.unsqueeze(-1)  # (B, T, Hv) -> (B, T, Hv, 1)
    if beta is not None:
        beta = beta.unsqueeze(-1)  # (B, T, Hv) -> (B, T, Hv, 1)
    bounds = tuple(host_bounds(B, T, cu_seqlens))
    plan = make_plan(bounds, max(1, SLAB // (CHUNK * Hv)), v.device)
    # (B, T, H, D) -> (B · T, H, D)
    tokens = [None if x is None else x.flatten(0, 1) for x in (q, k, v, decay, beta)]
    with torch.autocast(device_kind(v), enabled=False):
        o, state = _Chunked.apply(*tokens, initial_state, scale, plan)
    return None if o is None else o.view(v.shape), state


class _Chunked(torch.autograd.Function):
    """Tensors are (tokens, H, D), all sequences end to end; the plan has their bounds."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        initial_state: Tensor | None,
        scale: float,
        plan: Plan,
    ) -> tuple[Tensor | None, Tensor]:
        o = None if q is None else _rows_like(v, plan)
        state = _states(initial_state, k, v, plan)
        entered = []
        for slab in plan.slabs:
            # (sequences, H, Dk, Dv) -> (sequences · H, Dk, Dv), here and below
            entered.append(state[slab.sequences].flatten(0, 1).clone())
            terms = _Terms(slab, q, k, v, decay, beta, scale)
            states = terms.recur(state[slab.sequences].flatten(0, 1))
            if o is not None:
                slab.store((terms.edges[0] @ states).baddbmm_(terms.scores[0], terms.V), o)
        ctx.save_for_backward(q, k, v, decay, beta, initial_state, *entered)
        ctx.scale, ctx.plan = scale, plan
        ctx.set_materialize_grads(False)
        return o, torch.empty_like(state).index_copy_(0, plan.order, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, beta, initial_state, *entered = ctx.saved_tensors
        plan = ctx.plan
        if q is not None and do is None:
            do = torch.zeros_like(v)
        dq, dk, dv, ddecay, dbeta = (
            None if x is None else _rows_like(x, plan) for x in (q, k, v, decay, beta)
        )
        dstate = _states(dfinal, k, v, plan)
        for slab, state in zip(reversed(plan.slabs), reversed(entered), strict=True):
            terms = _Terms(slab, q, k, v, decay, beta, ctx.scale)
            gradients = terms.gradients(state, dstate[slab.sequences].flatten(0, 1), do)
            for out, slots in zip((dq, dk, dv, ddecay, dbeta), gradients, strict=True):
                if out is not None:
                    slab.store(slots, out)
        dinitial = None
        if initial_state is not None:
            dinitial = torch.empty_like(initial_state)
            dinitial[plan.order] = dstate.to(dinitial.dtype)
        return dq, dk, dv, ddecay, dbeta, dinitial, None, None


def _rows_like(x: Tensor, plan: Plan) -> Tensor:
    """An empty tensor like x, one row a token, with zeros if some rows belong to no sequence."""
    make = torch.empty_like if plan.tokens_in_sequences == len(x) else torch.zeros_like
    return make(x, memory_format=torch.contiguous_format)


def _states(x: Tensor | None, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """A copy of the states x (N, H, Dk, Dv) in the order of the plan; zeros for None."""
    dtype = accumulation_dtype(k.dtype)
    if x is None:
        N, (H, Dv), Dk = len(plan.order), v.shape[1:], k.shape[-1]
        return torch.zeros(N, H, Dk, Dv, dtype=dtype, device=k.device)
    return x.to(dtype).index_select(0, plan.order)


class _Terms:
    """The terms of a slab's chunks, named as at the top of this file; (chunks · H, C, D) each.

    Attributes:
        lefts: the rows that read the state: q, and with the delta rule k, which reads what is to
            be erased.
        scores: A and P, (chunks · H, C, C), of `lefts` with k.
        edges: Q and K̂, of `lefts`.
        inverse: (I + βP)⁻¹, (chunks · H, C, C).
        V: U at first; `recur` turns it into V' in place.
    """

    def __init__(
        self,
        slab: Slab,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        scale: float,
    ) -> None:
        H = v.shape[1]
        self.load = partial(slab.load, heads=H, dtype=accumulation_dtype(k.dtype))
        self.steps = [slice(step.start * H, step.stop * H) for step in slab.steps]
        self.scale = scale
        self.k, self.v = self.load(k), self.load(v)
        self.beta = None if beta is None else self.load(beta)
        self.weights = decay_in_chunks(None if decay is None else self.load(decay))

        self.lefts = [] if q is None else [self.load(q) * scale]
        if beta is not None:
            self.lefts.append(self.k)
        self.edges = [_weigh(left, self.weights.prefix) for left in self.lefts]
        self.scores = self.weights.scores(self.lefts, self.k)
        self.K = _weigh(self.k, self.weights.suffix)
        self.V, self.W = self.v, None
        if self.beta is not None:
            L = self.scores[-1].tril_(-1) * self.beta
            # Transposed, since the solver wants column-major matrices.
            identity = torch.eye(CHUNK, dtype=L.dtype, device=L.device).expand_as(L)
            self.inverse = torch.linalg.solve_triangular(
                L.mT, identity, upper=True, unitriangular=True
            ).mT
            solve = self.inverse * self.beta.mT
            self.V, self.W = solve @ self.v, solve @ self.edges[-1]

    def recur(self, state: Tensor) -> Tensor:
        """Step `state` (sequences · H, Dk, Dv) through the chunks, in place.

        Returns:
            the state that enters each chunk, (chunks · H, Dk, Dv).
        """
        total = self.weights.total
        states = self.k.new_empty(len(self.k), *state.shape[1:])
        entering, V, K, W, a = map(self._by_step, (states, self.V, self.K, self.W, total))
        for i, step in enumerate(self.steps):
            S = state[step]
            entering[i].copy_(S)
            if self.W is not None:
                V[i].baddbmm_(W[i], S, alpha=-1)
            if total is not None:
                S.mul_(a[i].mT)
            S.baddbmm_(K[i].mT, V[i])
        return states

    def recur_back(self, dstate: Tensor, dV: Tensor, d_entering: Tensor | None) -> Tensor:
        """Step `dstate` (sequences · H, Dk, Dv) back through the chunks, in place.

        Args:
            dV: gradient of V' from the outputs; that from the leaving states is added in place.
            d_entering: gradient of the entering states from the outputs, (chunks · H, Dk, Dv).

        Returns:
            the gradient of each chunk's leaving state, (chunks · H, Dk, Dv).
        """
        total = self.weights.total
        dstates = self.k.new_empty(len(self.k), *dstate.shape[1:])
        leaving, dv, K, W, a = map(self._by_step, (dstates, dV, self.K, self.W, total))
        entering = self._by_step(d_entering)
        for i in reversed(range(len(self.steps))):
            dS = dstate[self.steps[i]]
            leaving[i].copy_(dS)
            dv[i].baddbmm_(K[i], dS)
            if total is not None:
                dS.mul_(a[i].mT)
            if d_entering is not None:
                dS.add_(entering[i])
            if self.W is not None:
                dS.baddbmm_(W[i].mT, dv[i], alpha=-1)
        return dstates

    def _by_step(self, x: Tensor | None) -> Sequence[Tensor]:
        """(chunks · H, …) -> one (sequences of the step · H, …) for each step."""
        return () if x is None else x.split([step.stop - step.start for step in self.steps])

    def gradients(
        self, state: Tensor, dstate: Tensor, do: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the slab's q, k, v, decay and beta, (chunks · H, C, D) each.

        Args:
            state: that entered the slab, (sequences · H, Dk, Dv).
            dstate: gradient of the state that leaves the slab; becomes that of `state`, in place.
            do: gradient of all outputs, (tokens, H, Dv).
        """
        states = self.recur(state.clone())
        if do is None:
            dreads = []  # gradients of what each of `lefts` reads, (chunks · H, C, Dv)
            dstates = self.recur_back(dstate, dV := torch.zeros_like(self.v), None)
        else:
            dreads = [self.load(do)]
            dV = self.scores[0].mT @ dreads[0]
            dstates = self.recur_back(dstate, dV, self.edges[0].mT @ dreads[0])

        dbeta = None
        if self.beta is not None:
            # V' = β(v − K̂S − PV'). `found` is v less what the keys read, K̂S + PV', whose gradient
            # is −dv.
            found = torch.baddbmm(self.v, self.edges[-1], states, alpha=-1)
            found.baddbmm_(self.scores[-1], self.V, alpha=-1)
            dV = self.inverse.mT @ dV
            dbeta = (dV * found).sum(-1, keepdim=True)
            dV *= self.beta
            dreads.append(-dV)

        dscores = [(dread @ self.V.mT).tril_() for dread in dreads]
        if self.beta is not None:
            dscores[-1].tril_(-1)
        dlefts, dk, dx = self.weights.scores_grad(dscores, self.scores, self.lefts, self.k)
        dedges = [dread @ states.mT for dread in dreads]
        dK = self.V @ dstates.mT
        for dleft, dedge in zip(dlefts, dedges, strict=True):
            _add_weighed(dleft, dedge, self.weights.prefix)
        _add_weighed(dk, dK, self.weights.suffix)
        if self.beta is not None:
            dk += dlefts[-1]
        if dx is not None and not isinstance(self.weights, NoDecay):
            dprefix = torch.zeros_like(dK)  # gradient of log prefix; dK · K is that of log suffix
            for dedge, edge in zip(dedges, self.edges, strict=True):
                dprefix.addcmul_(dedge, edge)
            # (chunks · H, Dk, Dv) -> (chunks · H, 1, Dk), on the last row
            dprefix[:, -1:] += (states * dstates).sum(-1).unsqueeze(1) * self.weights.total
            dx = self.weights.edges_grad(dprefix, dK * self.K).add_(dx)
        dq = None if do is None else dlefts[0] * self.scale
        return dq, dk, dV, dx, dbeta


def _weigh(x: Tensor, weight: Tensor | None) -> Tensor:
    """x · weight; None is 1."""
    return x if weight is None else x * weight


def _add_weighed(out: Tensor, x: Tensor, weight: Tensor | None) -> None:
    """out += x · weight; None is 1."""
    if weight is None:
        out.add_(x)
    else:
        out.addcmul_(x, weight)
