"""Bytes a rank holds for weights, gradients and optimiser, and what ZeRO needs to reduce them.

What DeepSpeed 0.19 allocates, stage by stage, with N parameters, P ranks, e bytes a weight, and
buckets of B numbers (`train.engine.bucket`):

    stage            0                 1, bf16       1, fp32        2               3
    weights          e N               e N           e N            e N             e N / P
    masters          4 N in bf16       4 N / P       4 N / P        4 N / P         4 N / P
    gradients        e N               e N + 4 N     e N, 4 N / P   4 N / P         4 N / P
    buckets          when reducing     when reducing e B            e B             e B

Sources: `deepspeed/runtime/zero/stage_1_and_2.py`, `stage3.py`, `runtime/bf16_optimizer.py`,
`fp16/unfused_optimizer.py`; `tests/train/forecast` compares with what is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from parallel.travel.homes import Homes
from train.engine import BUCKET, bucket
from train.optimiser.optim import OptimConfig, is_orthogonal

_FP32, _FP64 = 4, 8
_LIVE = 1_000_000_000  # parameters that stage 3 holds whole at a time: DeepSpeed's default
_PREFETCHED = 50_000_000  # parameters in a message of stage 3, likewise


@dataclass(frozen=True)
class States:
    """Bytes of one rank.

    Attributes:
        weights: those that it keeps.
        optimiser: its means, and the fp32 weights that it steps if the model's are others.
        gradients: held from step to step.
        growing: held of each parameter from its own backward pass to the end of all of them.
        bucket: of the buffer for reducing, from the first gradient to the last.
        persistent: whether that buffer is always there.
        reduced: gradients when the optimiser steps, beside those that are always held.
        reducing: copies while gradients are reduced.
        stepping: what the step takes beside all these.
        gathered: weights of other ranks, in a forward or backward pass.
    """

    weights: float
    optimiser: float
    gradients: float
    growing: float
    bucket: float
    persistent: bool
    reduced: float
    reducing: float
    stepping: float
    gathered: float = 0.0


def states(
    shapes: Mapping[str, torch.Size],
    optim: OptimConfig,
    stage: int,
    ranks: int,
    dtype: torch.dtype,
) -> States:
    """What a rank of `ranks` holds under a stage of ZeRO.

    Args:
        shapes: of every parameter, by name.
    """
    count = {name: shape.numel() for name, shape in shapes.items()}
    matrices = {name: n for name, n in count.items() if is_orthogonal(name, shapes[name], optim)}
    N, M, e = sum(count.values()), sum(matrices.values()), dtype.itemsize
    low = e < _FP32
    share = ranks if stage else 1
    masters = _FP32 * N / share if stage or low else 0.0
    optimiser = masters + (2 * _FP32 * (N - M) + _FP32 * M) / share
    largest = max(count.values())
    muon = _muon(shapes, matrices, share, stage) if matrices else 0.0
    part = _FP32 * N / ranks
    size = float(bucket(N))
    if stage == 0:
        step = (_FP32 * N if low else 0.0) + muon
        return States(e * N, optimiser, 0, e * N, 0, False, e * N, e * min(BUCKET, N), step)
    if stage == 1 and low:
        flat = (_FP32 + e) * min(BUCKET, N)
        return States(e * N, optimiser, _FP32 * N, e * N, 0, False, e * N, flat, muon)
    if stage < 3:
        # The norm is computed in fp64, a parameter at a time.
        step = max(_FP64 * largest, muon, 0 if low else part)
        if stage == 1:
            return States(e * N, optimiser, 0, e * N, e * size, False, part, 0, step)
        # Buckets are copied to be sent, and widened in bf16.
        sent = (e * size if ranks > 1 or low else 0.0) + (_FP32 * largest if low else 0.0)
        return States(e * N, optimiser, 0, 0, e * size, False, part, sent, step)
    sent = e * size + (_FP32 * size / ranks if low else 0.0)
    whole = e * (min(_LIVE, N) + min(_PREFETCHED, N)) if ranks > 1 else 0.0
    step = part + muon
    return States(e * N / ranks, optimiser, part, 0, e * size, True, 0, sent, step, whole)


@dataclass(frozen=True)
class AtHome:
    """Bytes of one rank for experts that live at home, alike at every stage of ZeRO.

    Attributes:
        weights: of the experts that it has.
        optimiser: its part of the means, and of the fp32 weights if the model's are others.
        stepped: gradients when the optimiser steps: fp32, its part of what its replicas have too.
            Until then there are those of all it has.
        reducing: what sums over replicas take beside these.
        stepping: what the step takes.
    """

    weights: float = 0.0
    optimiser: float = 0.0
    stepped: float = 0.0
    reducing: float = 0.0
    stepping: float = 0.0


NOTHING = AtHome()


def at_home(
    stacks: Mapping[str, tuple[torch.Size, Homes]], optim: OptimConfig, dtype: torch.dtype
) -> AtHome:
    """What a rank with most experts holds (`train.experts`).

    Args:
        stacks: shape (experts, out, in) and homes of all experts' matrices, by name.
    """
    weights = optimiser = stepped = reducing = stepping = 0.0
    for name, (shape, homes) in stacks.items():
        first, end = homes.run(homes.fullest)
        share = int(np.bincount(homes.bounds[:, 0]).min()) if homes.replicated else 1
        here = torch.Size((end - first, *shape[1:]))
        n, orthogonal = here.numel(), is_orthogonal(name, shape, optim)
        numbers = (1 if orthogonal else 2) + (dtype.itemsize < _FP32)
        weights += dtype.itemsize * n
        optimiser += numbers * _FP32 * n / share
        stepped += _FP32 * n / share
        reducing += _FP32 * n * (share - 1) / share
        if orthogonal:
            shared = _muon({name: here}, {name: n}, share, 1 if homes.replicated else 0)
            stepping = max(stepping, shared)
    return AtHome(weights, optimiser, stepped, reducing, stepping)


def _muon(
    shapes: Mapping[str, torch.Size], matrices: Mapping[str, int], share: int, stage: int
) -> float:
    """Bytes that Muon's step takes beside its state (`train.optimiser.muon`)."""

    def iterating(shape: torch.Size) -> float:
        """The matrix scaled, its product with its own transpose and that one's square, the next
        one. Unless they are shared out, the matrices of a stack are worked on together."""
        rows, columns = sorted(shape[-2:])
        stacked = 1 if stage else math.prod(shape[:-2])
        return float(_FP32 * stacked * (3 * rows * columns + 2 * rows * rows))

    if not stage:
        # And the momentum, one step ahead.
        return max(iterating(shapes[name]) + _FP32 * n for name, n in matrices.items())
    # Momentum, whole matrices, and the update's slices.
    most = max(iterating(shapes[name]) for name in matrices)
    return 3 * _FP32 * sum(matrices.values()) / share + most
