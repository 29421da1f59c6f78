"""Validation: loss a token and bits a byte."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from data import Batch
from parallel import ParallelConfig, World, distribute
from train.engine import Engine


def evaluate(
    engine: Engine,
    batches: Sequence[Batch],
    byte_lengths: np.ndarray,
    world: World,
    parallel: ParallelConfig,
    stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """The loss over `batches`, on all ranks together.

    Args:
        byte_lengths: (vocabulary,) bytes of text that each token stands for.
        stopping: asked before every batch, on all ranks alike; true gives up.

    Returns:
        `val_loss`, nats a target token, and `val_bpb`, bits a byte of the text that the
        targets stand for; None if it was given up.
        Bits a byte compare across tokenizers; losses do not.
    """
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    targets = size = 0
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            if stopping():
                engine.train()
                return None
            tokens, labels, shard = distribute(
                batch.tokens, batch.labels, batch.cu_seqlens, world, parallel
            )
            _, cross_entropy = engine(tokens, labels, shard)
            nats += cross_entropy
            predicted = batch.labels[batch.labels >= 0]
            targets += len(predicted)
            size += int(byte_lengths[predicted].sum())
    engine.train()
    total = float(world.sum(nats))
    return {
        "val_loss": total / max(targets, 1),
        "val_bpb": total / math.log(2) / max(size, 1),
    }


def compressed_bits_per_byte(text: bytes) -> float:
    """Bits a byte of `text` under `xz -9`: a bar that everyone knows."""
    return 8 * len(lzma.compress(text, preset=9)) / max(len(text), 1)
