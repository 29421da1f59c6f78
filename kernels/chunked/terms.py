"""What the chunks of a slab compute, forward and backward, many at once.

Inside a chunk, with rows q (scaled already), k, v; S the state that enters, S' the one that leaves;
prefix, suffix, total and the weighted scores as in `kernels.chunked.decay`:

    A = scores(q, k)           Q = q·prefix     V' = (I + βP)⁻¹ β(v − K̂S) = U − W S
    P = scores(k, k), i > j    K̂ = k·prefix     o  = Q S + A V'
                               K = k·suffix     S' = total·S + Kᵀ V'

and V' = v without β.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.chunked.decay import CHUNK, NoDecay, decay_in_chunks, exp
from kernels.chunked.plan import Slab
from kernels.packing import accumulation_dtype


class Terms:
    """The terms of a slab's chunks, named as above; (chunks · H, C, D) each.

    Attributes:
        lefts: the rows that read the state: q, and with the delta rule k, which reads what is to
            be erased.
        scores: A and P, (chunks · H, C, C), of `lefts` with k.
        edges: Q and K̂, of `lefts`.
        inverse: (I + βP)⁻¹, (chunks · H, C, C).
        V: U at first; `recur` turns it into V' in place. Followed by `columns` columns to which
            nothing is written.
    """

    def __init__(
        self,
        slab: Slab,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        scale: float,
        columns: int = 0,
    ) -> None:
        H = v.shape[1]
        self.load = partial(slab.load, heads=H, dtype=accumulation_dtype(k.dtype))
        self.steps = [slice(step.start * H, step.stop * H) for step in slab.steps]
        self.scale = scale
        self.k, self.v = self.load(k), self.load(v)
        self.beta = None if beta is None else self.load(beta)
        self.weights = decay_in_chunks(None if decay is None else self.load(decay))

        self.lefts = [self.load(q) * scale]
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
        if columns:
            self.V = F.pad(self.V, (0, columns))

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

    def outputs(self, states: Tensor) -> Tensor:
        """o (chunks · H, C, Dv), from the states that enter the chunks, after `recur`."""
        return (self.edges[0] @ states).baddbmm_(self.scores[0], self.V)

    def decayed_reads(self, log_left: Tensor) -> Tensor:
        """What each row reads of the state that entered its sequence, without the delta rule:
        (chunks · H, C, Dk).

        Args:
            log_left: log of what is left of it when it enters the slab, (sequences · H, 1, 1 | Dk);
                becomes that when it leaves the slab, in place.
        """
        log_total = self.weights.log_total
        if log_total is None:
            return self.edges[0]
        log_entering = torch.empty_like(log_total)
        pairs = zip(*map(self._by_step, (log_entering, log_total)), self.steps, strict=True)
        for entering, total, step in pairs:
            left = log_left[step]
            entering.copy_(left)
            left.add_(total)
        return self.edges[0] * exp(log_entering)

    def recur_back(self, dstate: Tensor, dV: Tensor, d_entering: Tensor) -> Tensor:
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
            dS.add_(entering[i])
            if self.W is not None:
                dS.baddbmm_(W[i].mT, dv[i], alpha=-1)
        return dstates

    def _by_step(self, x: Tensor | None) -> Sequence[Tensor]:
        """(chunks · H, …) -> one (sequences of the step · H, …) for each step."""
        return () if x is None else x.split([step.stop - step.start for step in self.steps])

    def gradients(self, state: Tensor, dstate: Tensor, do: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the slab's q, k, v, decay and beta, (chunks · H, C, D) each.

        Args:
            state: that entered the slab, (sequences · H, Dk, Dv).
            dstate: gradient of the state that leaves the slab; becomes that of `state`, in place.
            do: gradient of all outputs, (tokens, H, Dv).
        """
        states = self.recur(state.clone())
        dreads = [self.load(do)]  # gradients of what each of `lefts` reads, (chunks · H, C, Dv)
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
        return dlefts[0] * self.scale, dk, dV, dx, dbeta


def _weigh(x: Tensor, weight: Tensor | None) -> Tensor:
    """x · weight; None is 1."""
    return x if weight is None else x * weight


def _add_weighed(out: Tensor, x: Tensor, weight: Tensor | None) -> None:
    """out += x · weight; None is 1."""
    if weight is None:
        out.add_(x)
    else:
        out.addcmul_(x, weight)
