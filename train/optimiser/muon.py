"""Muon: the momentum of a matrix, orthogonalised, is its update (Jordan et al. 2024).

ZeRO leaves a rank a flat slice of every matrix or of some. An update is made from a whole
matrix, so each matrix has an owner: the ranks send it their slices of the momentum, it
orthogonalises, and each slice of the result goes back to where it came from. So every element
travels twice and every matrix is worked on once, whatever the stage.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import unwrap
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from parallel import World
from parallel.travel import exchange
from train.optimiser.optim import OptimConfig


@dataclass(frozen=True)
class Piece:
    """What ranks hold of one matrix.

    shape: of the matrix. offset: where this rank's slice of it begins in its flat tensor.
    bounds: rank r holds elements bounds[r] to bounds[r + 1] of the flattened matrix.
    """

    shape: torch.Size
    offset: int
    bounds: Sequence[int]

    def each(self, rank: int) -> Iterator[Piece]:
        """What ranks hold of each matrix of a stack (E, m, n); of a matrix, the piece itself."""
        if len(self.shape) == 2:
            yield self
            return
        size = self.shape[1] * self.shape[2]
        for first in range(0, self.shape[0] * size, size):
            bounds = [min(max(bound - first, 0), size) for bound in self.bounds]
            before = max(first - self.bounds[rank], 0)
            yield Piece(self.shape[1:], self.offset + before, bounds)


class Muon(torch.optim.AdamW):
    """AdamW; groups marked `orthogonal` are matrices and take Muon's step instead.

    Their update has the root mean square 0.2 of a typical one of AdamW, so that learning rate
    and weight decay carry over (Liu et al. 2025, arXiv 2502.16982).

    Args:
        momentum: decay of the mean of gradients of orthogonal groups, which looks one step
            ahead (Nesterov); it is kept as `exp_avg`.
        world: the ranks that share what `pieces` says.
    """

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float, world: World, **adamw: Any
    ) -> None:
        super().__init__(groups, **adamw)
        self.momentum, self.world = momentum, world
        # By flat tensor of the optimiser, if matrices are shared out; set once they are.
        self.pieces: dict[Tensor, list[Piece]] = {}

    # Around these torch imports its compiler, a second of every rank's start, to keep it out.
    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    _adamw_step = unwrap(torch.optim.AdamW.step)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group["orthogonal"]]
        try:
            self._adamw_step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        mean = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
        mean.lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(mean, self.momentum)
        if parameter in self.pieces:
            update = _orthogonal_pieces(ahead, self.pieces[parameter], self.world)
        else:
            update = orthogonal(ahead)
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)


def muon(groups: list[dict[str, Any]], config: OptimConfig, world: World) -> Muon:
    """The optimiser of groups of `parameter_groups`; a step sets its learning rate first."""
    return Muon(
        groups,
        config.momentum,
        world,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, nearly, with a root mean square of 0.2.

    Args:
        matrix: (m, n), or a stack of them (E, m, n), each by itself. Singular values are brought
            into about [0.7, 1.2] by five steps of Newton and Schulz's iteration with Jordan's
            coefficients; products are bf16 on a GPU, in the matrix's own dtype elsewhere.

    Returns:
        The same shape and dtype.
    """
    x = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix
    tall = x.shape[-2] > x.shape[-1]
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    if tall:
        x = x.mT
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / (size.to(x.dtype) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    x = x.mT if tall else x
    return x.to(matrix.dtype) * (0.2 * max(matrix.shape[-2:]) ** 0.5)


def _orthogonal_pieces(flat: Tensor, pieces: list[Piece], world: World) -> Tensor:
    """`orthogonal` of every matrix that ranks hold pieces of; zero where `flat` is padding."""
    rank = world.rank
    owners = _owners(pieces, world.size)

    def slices(of: Tensor) -> list[Tensor]:
        return [of[p.offset :][: p.bounds[rank + 1] - p.bounds[rank]] for p in pieces]

    whole = {j: flat.new_empty(p.shape) for j, p in enumerate(pieces) if owners[j] == rank}
    result = torch.zeros_like(flat)
    there = {
        j: [matrix.view(-1)[a:b] for a, b in pairwise(pieces[j].bounds)]
        for j, matrix in whole.items()
    }
    _trade(slices(flat), there, owners, world, home=False)
    for matrix in whole.values():
        matrix.copy_(orthogonal(matrix))
    _trade(slices(result), there, owners, world, home=True)
    return result


def _trade(
    slices: list[Tensor],
    owned: dict[int, list[Tensor]],
    owners: list[int],
    world: World,
    home: bool,
) -> None:
    """Slices of matrices to the owners', or the owners' to where they belong.

    Args:
        slices: this rank's slice of each matrix.
        owned: every rank's slice of the matrices that this rank owns.
    """
    outside: dict[int, list[Tensor]] = {}
    inside: dict[int, list[Tensor]] = {}
    for j, owner in enumerate(owners):
        if owner == world.rank:
            for peer, part in enumerate(owned[j]):
                if peer == world.rank:
                    target, source = (slices[j], part) if home else (part, slices[j])
                    target.copy_(source)
                else:
                    inside.setdefault(peer, []).append(part)
        else:
            outside.setdefault(owner, []).append(slices[j])
    sends, receives = (inside, outside) if home else (outside, inside)
    exchange.post(sends, receives, world.group)()


def _owners(pieces: list[Piece], ranks: int) -> list[int]:
    """The rank that works on each matrix: the largest first, to whoever has the least to do."""
    cost = [piece.shape.numel() * min(piece.shape) for piece in pieces]
    load = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(pieces)
    for j in sorted(range(len(pieces)), key=lambda j: -cost[j]):
        least, rank = heapq.heappop(load)
        owners[j] = rank
        heapq.heappush(load, (least + cost[j], rank))
    return owners
