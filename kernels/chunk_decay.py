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

Shapes: tensors are (..., C, D) with C = CHUNK; x is (..., C, 1) for a decay a head, (..., C, Dk)
for a decay a channel. Each class here is one kind of decay, with the same members.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 64


def decay_in_chunks(x: Tensor | None) -> Undecayed | HeadDecay | ChannelDecay:
    """The decay of chunks (..., C, 1 | Dk), or none."""
    if x is None:
        return Undecayed()
    # Below the floor exp is zero in x's precision anyway; sums of clamped decays stay small.
    x = x.clamp(min=-800.0 if x.dtype == torch.float64 else -120.0)
    return HeadDecay(x) if x.shape[-1] == 1 else ChannelDecay(x)


class Undecayed:
    """Every weight is one."""

    prefix = suffix = total = None

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        return [(left @ k.mT).tril_() for left in lefts]

    def scores_grad(
        self, grads: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, None]:
        """Gradients of `lefts`, k and x, given those of `scores` (zero above the diagonal)."""
        return [grad @ k for grad in grads], sum_of_products(grads, lefts), None


class HeadDecay:
    """One decay a token: the weights of pairs are a (C, C) matrix."""

    def __init__(self, x: Tensor) -> None:
        # Differences of fp64 sums are as good as sums over the tokens between.
        g = x.double().squeeze(-1).cumsum(-1)
        self.prefix = g.to(x.dtype).exp().unsqueeze(-1)
        self.suffix = (g[..., -1:] - g).to(x.dtype).exp_().unsqueeze(-1)
        self.total = self.prefix[..., -1:, :]
        between = (g.unsqueeze(-1) - g.unsqueeze(-2)).to(x.dtype)
        self.pairs = between.masked_fill_(above_diagonal(x.device), -torch.inf).exp_()

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        return [(left @ k.mT).mul_(self.pairs) for left in lefts]

    def scores_grad(
        self, grads: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        grads = [grad * self.pairs for grad in grads]
        dlefts = [grad @ k for grad in grads]
        dlog = torch.zeros_like(grads[0])
        for grad, left in zip(grads, lefts, strict=True):
            dlog.addcmul_(grad, left @ k.mT)
        # The decay of t is in every pair with j < t ≤ i.
        C = CHUNK
        before = dlog @ torch.ones(C, C, dtype=k.dtype, device=k.device).triu_(1)
        dx = before.tril_().sum(-2).unsqueeze(-1)
        return dlefts, sum_of_products(grads, lefts), dx

    def edges_grad(self, dprefix: Tensor, dsuffix: Tensor) -> Tensor:
        """Gradient of x given those of log prefix and log suffix, (..., C, Dk)."""
        dprefix, dsuffix = dprefix.sum(-1, keepdim=True), dsuffix.sum(-1, keepdim=True)
        after = dprefix.flip(-2).cumsum(-2).flip(-2)
        return after.add_(dsuffix.cumsum(-2)).sub_(dsuffix)


class ChannelDecay:
    """A decay a token and channel: pairs are factored, halving the chunk again and again.

    For a block of 2b tokens, the pairs (i in its second half, j in its first) split at the
    second half's first token n: exp Σ_{n < t ≤ i} x_t goes to left_i, exp Σ_{j < t ≤ n} x_t
    to k_j. Every pair i > j belongs to just one such block, so b = 32, 16, …, 1 covers them all.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        lower, upper = edge_sums(x.dtype, x.device)
        self.prefix = (lower @ x).exp_()
        self.suffix = (upper @ x).exp_()
        self.total = self.prefix[..., -1:, :]

    def scores(self, lefts: Sequence[Tensor], k: Tensor) -> list[Tensor]:
        C = CHUNK
        scores = [torch.zeros(*k.shape[:-1], C, dtype=k.dtype, device=k.device) for _ in lefts]
        for score, left in zip(scores, lefts, strict=True):
            score.diagonal(dim1=-2, dim2=-1).copy_((left * k).sum(-1))
        for b, sums in level_sums(k.dtype, k.device):
            weights = (sums @ self.x).exp_()
            columns = halves(k * weights, b)[0].mT
            for score, left in zip(scores, lefts, strict=True):
                blocks(score, b).copy_(halves(left * weights, b)[1] @ columns)
        return scores

    def scores_grad(
        self, grads: Sequence[Tensor], lefts: Sequence[Tensor], k: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        diagonals = [grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) for grad in grads]
        dlefts = [diagonal * k for diagonal in diagonals]
        dk = sum(d * left for d, left in zip(diagonals, lefts, strict=True))
        assert isinstance(dk, Tensor)
        dx = torch.zeros_like(self.x)
        for b, sums in level_sums(k.dtype, k.device):
            weights = (sums @ self.x).exp_()
            first, second = halves(weights, b)
            columns = halves(k, b)[0] * first
            dcolumns = torch.zeros_like(columns)
            dsums = torch.zeros_like(weights)
            for grad, left, dleft in zip(grads, lefts, dlefts, strict=True):
                block = blocks(grad, b)
                rows = halves(left, b)[1] * second
                drows = block @ columns
                dcolumns += block.mT @ rows
                halves(dleft, b)[1].addcmul_(drows, second)
                halves(dsums, b)[1].addcmul_(drows, rows)
            halves(dk, b)[0].addcmul_(dcolumns, first)
            halves(dsums, b)[0].addcmul_(dcolumns, columns)
            dx += sums.mT @ dsums
        return dlefts, dk, dx

    def edges_grad(self, dprefix: Tensor, dsuffix: Tensor) -> Tensor:
        lower, upper = edge_sums(dprefix.dtype, dprefix.device)
        return lower.mT @ dprefix + upper.mT @ dsuffix


def sum_of_products(grads: Sequence[Tensor], lefts: Sequence[Tensor]) -> Tensor:
    """Σ gradᵀ left: what k's rows get as the right side of `scores`."""
    total = grads[0].mT @ lefts[0]
    for grad, left in zip(grads[1:], lefts[1:], strict=True):
        total += grad.mT @ left
    return total


def halves(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Views (..., C / 2b, b, D) of the first and second halves of x's blocks of 2b rows."""
    first, second = x.unflatten(-2, (-1, 2, b)).unbind(-3)
    return first, second


def blocks(scores: Tensor, b: int) -> Tensor:
    """View (..., C / 2b, b, b): second half against first half, in each block of 2b tokens."""
    tiles = scores.unflatten(-1, (-1, 2, b)).unflatten(-4, (-1, 2, b))[..., 1, :, :, 0, :]
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@cache
def above_diagonal(device: torch.device) -> Tensor:
    return torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).triu_(1)


@cache
def edge_sums(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(C, C) matrices of zeros and ones that sum x up to a token, and after it."""
    ones = torch.ones(CHUNK, CHUNK, dtype=dtype, device=device)
    return ones.tril(), ones.triu(1)


@cache
def level_sums(dtype: torch.dtype, device: torch.device) -> list[tuple[int, Tensor]]:
    """(b, (C, C) matrix of zeros and ones): the sums of `ChannelDecay` for each block size."""
    levels = []
    token = torch.arange(CHUNK, device=device)
    row, t = token[:, None], token[None, :]
    b = CHUNK // 2
    while b:
        start = row // (2 * b) * (2 * b) + b  # n: the first token of the block's second half
        between = torch.where(row < start, (row < t) & (t <= start), (start < t) & (t <= row))
        levels.append((b, between.to(dtype)))
        b //= 2
    return levels
