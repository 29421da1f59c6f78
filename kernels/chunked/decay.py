"""Decays inside a chunk: the weights of pairs of tokens, and of tokens against the chunk's edges.

With x_t ≤ 0 the log decay of token t, each weight is the exponential of a sum of x over a run of
tokens, so no exponent is positive:

    prefix_i = exp Σ_{t ≤ i} x_t         weight of the entering state at token i
    suffix_j = exp Σ_{t > j} x_t         weight of token j in the leaving state
    total    = exp Σ_t x_t               weight of the entering state in the leaving state
    scores_ij = ⟨left_i, k_j ⊙ exp Σ_{j < t ≤ i} x_t⟩   for j ≤ i, else 0

A sum runs over the tokens between its two ends. It is not the difference of two cumulative sums in
fp32, whose rounding would be that of the larger sums: so a token that clears the state (x = −1e4)
costs its neighbours no precision, and tiny gradients are not lost in rounding.

Shapes: (G, C, D) for G chunks of C = CHUNK tokens; x is (G, C, 1) for one decay a token and head,
(G, C, Dk) for one a channel; scores are (G, C, C). Each class is one kind of decay; all have the
same members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 32  # tokens; a power of two, since `ChannelDecay` halves it


def decay_in_chunks(x: Tensor | None) -> NoDecay | HeadDecay | ChannelDecay:
    """The weights of chunks with log decays x (G, C, 1 | Dk); None: no decay."""
    if x is None:
        return NoDecay()
    x = x.clamp(min=2 * _least(x.dtype))  # −∞ becomes finite; the weight is zero either way
    return HeadDecay(x) if x.shape[-1] == 1 else ChannelDecay(x)


class NoDecay:
    """Every weight is one."""

    prefix = suffix = total = log_total = None

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        """(G, C, C) for each of `lefts` (G, C, Dk)."""
        return [(left @ k.mT).tril_() for left in lefts]

    def scores_grad(
        self, grads: Sequence[Tensor], scores: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, None]:
        """Gradients of `lefts`, k and x, given those of `scores`, zero above the diagonal."""
        return [grad @ k for grad in grads], _sum_of_products(grads, lefts, k), None


class HeadDecay:
    """One decay a token and head: the weights of pairs are a matrix, (G, C, C)."""

    def __init__(self, x: Tensor) -> None:
        # Differences of cumulative sums in fp64 are as exact as fp32 sums over the tokens between.
        g = x.double().squeeze(-1).cumsum(-1)
        self.prefix = exp(g.to(x.dtype, copy=True)).unsqueeze(-1)
        self.suffix = exp((g[..., -1:] - g).to(x.dtype)).unsqueeze(-1)
        self.total = self.prefix[..., -1:, :]
        self.log_total = g[..., -1:, None].to(x.dtype)
        pairs = (g.unsqueeze(-1) - g.unsqueeze(-2)).to(x.dtype)  # (G, C) -> (G, C, C)
        self.pairs = exp(pairs.clamp_(max=0)).tril_()

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        return [(left @ k.mT).mul_(self.pairs) for left in lefts]

    def scores_grad(
        self, grads: Sequence[Tensor], scores: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        dlog = torch.zeros_like(self.pairs)
        for grad, score in zip(grads, scores, strict=True):
            dlog.addcmul_(grad, score)
        # x_t is in the weight of every pair with j < t ≤ i: sum dlog (G, C, C) over these.
        _, after = _edge_sums(k.dtype, k.device)
        dx = (dlog @ after).tril_().sum(-2).unsqueeze(-1)  # (G, C, C) -> (G, C, 1)
        grads = [grad * self.pairs for grad in grads]
        return [grad @ k for grad in grads], _sum_of_products(grads, lefts, k), dx

    def edges_grad(self, dprefix: Tensor, dsuffix: Tensor) -> Tensor:
        """Gradient of x (G, C, 1), given those of log prefix and of log suffix, (G, C, Dk) each."""
        upto, after = _edge_sums(dprefix.dtype, dprefix.device)
        dprefix, dsuffix = dprefix.sum(-1, keepdim=True), dsuffix.sum(-1, keepdim=True)
        return upto.mT @ dprefix + after.mT @ dsuffix


class ChannelDecay:
    """One decay a token and channel. The weight of a pair is in the product over channels, so it is
    split into a factor of left_i and one of k_j, neither larger than 1.

    The chunk is halved again and again. In a block of 2b tokens, let n be the first token of the
    second half. For i in the second half and j in the first, left_i takes exp Σ_{n < t ≤ i} x_t and
    k_j takes exp Σ_{j < t ≤ n} x_t. Every pair i > j is in exactly one such block of the sizes
    b = C/2, …, 2, 1.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        upto, after = _edge_sums(x.dtype, x.device)
        self.prefix = exp(upto @ x)
        self.suffix = exp(after @ x)
        self.total = self.prefix[..., -1:, :]
        self.log_total = x.sum(-2, keepdim=True)

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        scores = []
        for left in lefts:
            score = torch.zeros(*k.shape[:-1], CHUNK, dtype=k.dtype, device=k.device)
            score.diagonal(dim1=-2, dim2=-1).copy_((left * k).sum(-1))
            scores.append(score)
        for b, sums in _level_sums(k.dtype, k.device):
            first, second = _halves(exp(sums @ self.x), b)
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
            first, second = _halves(exp(sums @ self.x), b)
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
    """Log of the smallest weight that counts; smaller ones are zero: 1e-30, in fp64 1e-290."""
    return -668.0 if dtype == torch.float64 else -69.0


def exp(log_weight: Tensor) -> Tensor:
    """exp, in place. Weights below `_least` become zero: they would be denormal numbers, or make
    some in products, and a CPU takes about a hundred times as long for those."""
    least = _least(log_weight.dtype)
    return torch.threshold_(log_weight.clamp_(min=least).exp_(), 1.01 * math.exp(least), 0.0)


def _sum_of_products(grads: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor) -> Tensor:
    """Σ gradᵀ left, (G, C, Dk): the gradient of k, the right operand of `scores`."""
    total = torch.zeros_like(k)
    for grad, left in zip(grads, lefts, strict=True):
        total.baddbmm_(grad.mT, left)
    return total


def _halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """(G, C, D) -> two views (G, C / 2b, b, D): first and second half of each block of 2b rows."""
    first, second = x.unflatten(-2, (-1, 2, b)).unbind(-3)
    return first, second


def _blocks(scores: Tensor, b: int) -> Tensor:
    """(G, C, C) -> view (G, C / 2b, b, b): of each block of 2b tokens, the rows of its second half
    and the columns of its first."""
    # (G, C/2b, 2, b, C/2b, 2, b) at second, first half -> (G, C/2b, b, C/2b, b), then its diagonal
    tiles = scores.unflatten(-1, (-1, 2, b)).unflatten(-4, (-1, 2, b))[..., 1, :, :, 0, :]
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@cache
def _edge_sums(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (C, C) matrices of zeros and ones: sums over t ≤ i, and over t > i."""
    ones = torch.ones(CHUNK, CHUNK, dtype=dtype, device=device)
    return ones.tril(), ones.triu(1)


@cache
def _level_sums(dtype: torch.dtype, device: torch.device) -> list[tuple[int, Tensor]]:
    """(b, matrix) for each block size: (C, C) zeros and ones, the sums of `ChannelDecay`."""
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
