"""One stream: the sequences of a batch, shared out over the ranks.

A cut may fall anywhere. What a layer then needs from other ranks follows from the batch's
plan, which every rank has made for itself from the lengths alone (`parallel.planning.plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from parallel.config import ParallelConfig
from parallel.planning.planner import Planner, filled
from parallel.travel.exchange import to_device
from parallel.travel.view import Shard, View
from parallel.world import World


def shard(lengths: Sequence[int] | np.ndarray, device: torch.device | str, start: int = 0) -> Shard:
    """A shard of whole sequences; `start` is the position of each one's first token."""
    each = np.asarray(lengths, dtype=np.int64)
    return _shard(each, np.full(len(each), start), torch.device(device), None)


def _shard(
    lengths: np.ndarray, starts: np.ndarray, device: torch.device, view: View | None
) -> Shard:
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(cu_seqlens[-1]) + np.repeat(starts - cu_seqlens[:-1], lengths)
    return Shard(
        lengths=tuple(int(length) for length in lengths),
        cu_seqlens=to_device(cu_seqlens.astype(np.int32), device),
        positions=to_device(positions, device),
        view=view,
    )


def distribute(
    tokens: np.ndarray,
    labels: np.ndarray,
    cu_seqlens: np.ndarray,
    world: World,
    config: ParallelConfig | None = None,
    planner: Planner | None = None,
) -> tuple[Tensor, Tensor, Shard]:
    """This rank's part of a stream, on its device.

    Args:
        tokens, labels: (T,) int64, the whole stream; labels are shifted already, −100 for none.
        cu_seqlens: (N + 1,) int.
        planner: that has the batch's plan, or makes it; one for `config` unless given.

    Returns:
        tokens and labels (t,) int64 of this rank's shard, and the shard; t differs by at most
        one over the ranks. Where there are fewer tokens than ranks, sequences of one token
        without a label are added, so that every rank holds something.
    """
    lengths = filled(np.diff(cu_seqlens), world.size)
    missing = int(lengths.sum()) - len(tokens)
    tokens = np.concatenate([tokens, np.zeros(missing, tokens.dtype)])
    labels = np.concatenate([labels, np.full(missing, -100, labels.dtype)])
    if world.size == 1:
        return (
            to_device(tokens, world.device),
            to_device(labels, world.device),
            shard(lengths[lengths > 0], world.device),
        )
    if planner is None:
        with closing(Planner(config or ParallelConfig(), world.topology)) as own:
            made, attention = own.plan(lengths), own.config.attention
    else:
        made, attention = planner.plan(lengths), planner.config.attention
    view = View(made, world.rank, world.group, attention, world.device)
    spans = made.stream.rows(world.rank)
    sequence, starts, ends = (
        column[spans] for column in (made.stream.sequence, made.stream.start, made.stream.end)
    )
    first = made.cu_seqlens[sequence] + starts
    sizes = ends - starts
    here = np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)
    return (
        to_device(tokens[here], world.device),
        to_device(labels[here], world.device),
        _shard(sizes, starts, world.device, view),
    )
