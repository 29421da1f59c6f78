"""Validation: loss a token, bits a byte, accuracy, and how they change with the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batch
from parallel import Planner, World, distribute
from train.engine import Engine

_EDGES = 2 ** torch.arange(40)


class ByOctave:
    """Sums over targets by the octave of a number, a position or a length.

    Octave 0 holds the number 0, octave b the numbers from 2^(b−1) up to but without 2^b.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._edges = _EDGES.to(device)
        # Cross-entropy, hits, targets.
        self.sums = torch.zeros(3, len(_EDGES) + 1, dtype=torch.float64, device=device)

    def add(self, numbers: Tensor, labels: Tensor, nats: Tensor, hits: Tensor) -> None:
        """Count tokens in: all (T,); `nats` and `hits` are 0 where there is no label."""
        octave = torch.bucketize(numbers, self._edges, right=True)
        for row, values in zip(self.sums, (nats, hits, labels >= 0), strict=True):
            row.index_add_(0, octave, values.double())

    def loss(self) -> dict[str, float]:
        """The mean loss in nats of every octave with a target, by its first number."""
        nats, _, targets = self.sums.tolist()
        return {
            str(1 << octave >> 1): nats[octave] / targets[octave]
            for octave in range(len(targets))
            if targets[octave]
        }


def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    byte_lengths: np.ndarray,
    world: World,
    planner: Planner,
    stopping: Callable[[], bool],
) -> dict[str, Any] | None:
    """The loss over `batches`, on all ranks together.

    Args:
        planner: of the run, on this rank.
        byte_lengths: (vocabulary,) bytes of text that each token stands for.
        stopping: asked before every batch, on all ranks alike; true gives up.

    Returns:
        `val_loss`, nats a target token; `val_accuracy`, the share of targets that were the
        likeliest token; `val_loss_by_position`, the loss of each octave of positions by its
        first one; and, if tokens stand for text, `val_bpb`, bits a byte of what the targets
        stand for. None if it was given up.
        Bits a byte compare across tokenizers; losses do not.
    """
    positions = ByOctave(world.device)
    size = 0
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            if stopping():
                engine.train()
                return None
            tokens, labels, shard = distribute(
                batch.tokens, batch.labels, batch.cu_seqlens, world, planner=planner
            )
            nats, hits = engine(tokens, labels, shard)
            positions.add(shard.positions, labels, nats, hits)
            size += int(byte_lengths[batch.labels[batch.labels >= 0]].sum())
    engine.train()
    world.sum(positions.sums)
    return summary(positions, size) | {"val_loss_by_position": positions.loss()}


def summary(sums: ByOctave, size: int) -> dict[str, Any]:
    """`val_loss`, `val_accuracy` and, if `size`, bytes of text, is not 0, `val_bpb`; {} without
    a target."""
    nats, hits, targets = sums.sums.sum(1).tolist()
    if not targets:
        return {}
    row: dict[str, Any] = {"val_loss": nats / targets}
    if size:
        row["val_bpb"] = nats / math.log(2) / size
    return row | {"val_accuracy": hits / targets}
