"""Decays inside a chunk: what weighs each pair of tokens, and each token against the chunk's edges.

With x_t the log decay of token t, everything a chunk needs is the exponential of a sum of x
over a run of tokens, so no exponent is positive:

    prefix_i = exp Σ_{t ≤ i} x_t         the entering state, as token i sees it
    suffix_j = exp Σ_{t > j} x_t         token j, as the leaving state sees it
    total    = exp Σ_t x_t               the entering state, as the leaving state sees it
    scores_ij = ⟨left_i, k_j ⊙ exp Σ_{j < t ≤ i} x_t⟩   for j ≤ i, else 0

Sums run over the tokens between the two ends and are never the small difference of two large
ones: a token that wipes the state (x = −1e4) costs its neighbours no precision, and a gradient
that is truly tiny is not drowned in rounding.

Shapes: tensors are (G, C, D) for G chunks of C = CHUNK tokens; x is (G, C, 1) for a decay a head,
(G, C, Dk) for a decay a channel. Each class here is one kind of decay, with the same members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 32


def decay_in_chunks(x: Tensor | None) -> Undecayed | HeadDecay | ChannelDecay:
    """The decay of chunks (G, C, 1 | Dk), or none."""
    if x is None:
        return Undecayed()
    x = x.clamp(min=2 * _least(x.dtype))  # weighs nothing all the same, and is finite
    return HeadDecay(x) if x.shape[-1] == 1 else ChannelDecay(x)


class Undecayed:
    """Every weight is one."""

    prefix = suffix = total = None

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        return [(left @ k.mT).tril_() for left in lefts]

    def scores_grad(
        self, grads: Sequence[Tensor], scores: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, None]:
        """Gradients of `lefts`, k and x, given those of `scores` (zero above the diagonal)."""
        return [grad @ k for grad in grads], _sum_of_products(grads, lefts, k), None


class HeadDecay:
    """One decay a token: the weights of pairs are a (C, C) matrix."""

    def __init__(self, x: Tensor) -> None:
        # Differences of fp64 sums are as good as sums over the tokens between.
        g = x.double().squeeze(-1).cumsum(-1)
        self.prefix = _exp(g.to(x.dtype, copy=True)).unsqueeze(-1)
        self.suffix = _exp((g[..., -1:] - g).to(x.dtype)).unsqueeze(-1)
        self.total = self.prefix[..., -1:, :]
        pairs = (g.unsqueeze(-1) - g.unsqueeze(-2)).to(x.dtype)
        self.pairs = _exp(pairs.clamp_(max=0)).tril_()

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        return [(left @ k.mT).mul_(self.pairs) for left in lefts]

    def scores_grad(
        self, grads: Sequence[Tensor], scores: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        dlog = torch.zeros_like(self.pairs)
        for grad, score in zip(grads, scores, strict=True):
            dlog.addcmul_(grad, score)
        # The decay of t is in every pair with j < t ≤ i.
        _, after = _edge_sums(k.dtype, k.device)
        dx = (dlog @ after).tril_().sum(-2).unsqueeze(-1)
        grads = [grad * self.pairs for grad in grads]
        return [grad @ k for grad in grads], _sum_of_products(grads, lefts, k), dx

    def edges_grad(self, dprefix: Tensor, dsuffix: Tensor) -> Tensor:
        """Gradient of x given those of log prefix and log suffix, (G, C, Dk)."""
        upto, after = _edge_sums(dprefix.dtype, dprefix.device)
        dprefix, dsuffix = dprefix.sum(-1, keepdim=True), dsuffix.sum(-1, keepdim=True)
        return upto.mT @ dprefix + after.mT @ dsuffix


class ChannelDecay:
    """A decay a token and channel: pairs are factored, halving the chunk again and again.

    For a block of 2b tokens, the pairs (i in its second half, j in its first) split at the
    second half's first token n: exp Σ_{n < t ≤ i} x_t goes to left_i, exp Σ_{j < t ≤ n} x_t
    to k_j. Every pair i > j belongs to just one such block, so b = C/2, …, 2, 1 covers them all.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        upto, after = _edge_sums(x.dtype, x.device)
        self.prefix = _exp(upto @ x)
        self.suffix = _exp(after @ x)
        self.total = self.prefix[..., -1:, :]

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        scores = []
        for left in lefts:
            score = torch.zeros(*k.shape[:-1], CHUNK, dtype=k.dtype, device=k.device)
            score.diagonal(dim1=-2, dim2=-1).copy_((left * k).sum(-1))
            scores.append(score)
        for b, sums in _level_sums(k.dtype, k.device):
            first, second = _halves(_exp(sums @ self.x), b)
            columns = (_halves(k, b)[0] * first).mT
            for score, left in zip(scores, lefts, strict=True):
                _blocks(score, b).copy_((_halves(left, b)[1] * second) @ columns)
        return scores

    def scores_grad(
        self, grads: Sequence[Tensor], scores: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        diagonals = [grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) for grad in grads]
        dlefts = [diagonal * k for diagonal in diagonals]
        dk = torch.zeros_like(k)
        for diagonal, left in zip(diagonals, lefts, strict=True):
            dk.addcmul_(diagonal, left)
        dx = torch.zeros_like(self.x)
        dsums = torch.empty_like(self.x)
        for b, sums in _level_sums(k.dtype, k.device):
            first, second = _halves(_exp(sums @ self.x), b)
            columns = _halves(k, b)[0] * first
            dcolumns = torch.zeros_like(columns)
            dfirst, dsecond = _halves(dsums.zero_(), b)
            for grad, left, dleft in zip(grads, lefts, dlefts, strict=True):
                block = _blocks(grad, b)
                rows = _halves(left, b)[1] * second
                drows = block @ columns
                dcolumns += block.mT @ rows
                _halves(dleft, b)[1].addcmul_(drows, second)
                dsecond.addcmul_(drows, rows)
            _halves(dk, b)[0].addcmul_(dcolumns, first)
            dfirst.addcmul_(dcolumns, columns)
            dx += sums.mT @ dsums
        return dlefts, dk, dx

    def edges_grad(self, dprefix: Tensor, dsuffix: Tensor) -> Tensor:
        upto, after = _edge_sums(dprefix.dtype, dprefix.device)
        return upto.mT @ dprefix + after.mT @ dsuffix


def _least(dtype: torch.dtype) -> float:
    """The log of the least weight that is told from zero: 1e-30, or 1e-290 in fp64."""
    return -668.0 if dtype == torch.float64 else -69.0


def _exp(log_weight: Tensor) -> Tensor:
    """exp in place. What would be denormal, or breed denormals, becomes zero: a CPU takes a
    hundred times as long over each."""
    least = _least(log_weight.dtype)
    return torch.threshold_(log_weight.clamp_(min=least).exp_(), 1.01 * math.exp(least), 0.0)


def _sum_of_products(grads: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor) -> Tensor:
    """Σ gradᵀ left: the gradient of k, the right side of `scores`."""
    total = torch.zeros_like(k)
    for grad, left in zip(grads, lefts, strict=True):
        total.baddbmm_(grad.mT, left)
    return total


def _halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Views (G, C / 2b, b, D) of the first and second halves of x's blocks of 2b rows."""
    first, second = x.unflatten(-2, (-1, 2, b)).unbind(-3)
    return first, second


def _blocks(scores: Tensor, b: int) -> Tensor:
    """View (G, C / 2b, b, b): second half against first half, in each block of 2b tokens."""
    tiles = scores.unflatten(-1, (-1, 2, b)).unflatten(-4, (-1, 2, b))[..., 1, :, :, 0, :]
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@cache
def _edge_sums(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C, C) matrices of zeros and ones that sum x up to each token, and after it."""
    ones = torch.ones(CHUNK, CHUNK, dtype=dtype, device=device)
    return ones.tril(), ones.triu(1)


@cache
def _level_sums(dtype: torch.dtype, device: torch.device) -> list[tuple[int, Tensor]]:
    """(b, (C, C) matrix of zeros and ones): the sums of `ChannelDecay` for each block size."""
    levels = []
    token = torch.arange(CHUNK, device=device)
    row, t = token[:, None], token[None, :]
    b = CHUNK // 2
    while b:
        n = row // (2 * b) * (2 * b) + b
        between = torch.where(row < n, (row < t) & (t <= n), (n < t) & (t <= row))
        levels.append((b, between.to(dtype)))
        b //= 2
    return levels
