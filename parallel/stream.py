"""One stream: the sequences of a batch, divided over the ranks.

A sequence may be cut anywhere. Which rank holds which tokens, and what its layers need from others,
is in the batch's plan, which every rank computes from the lengths alone (`parallel.planning.plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from parallel.config import ParallelConfig
from parallel.planning.planner import Planner, pad_to_ranks
from parallel.travel.exchange import to_device
from parallel.travel.view import Shard, View
from parallel.world import World


def shard(lengths: Sequence[int] | np.ndarray, device: torch.device | str, start: int = 0) -> Shard:
    """A shard that no other rank shares: whole sequences, or their continuations from a cache.

    Args:
        lengths: (N,) int, tokens of each.
        start: position of the first token of every one of them; 0 unless they are continued.
    """
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
    """This rank's shard of a stream, on its device.

    Args:
        tokens, labels: (T,) int64, the whole stream, the same on every rank. Labels are shifted
            already; −100 marks a token without a target.
        cu_seqlens: (N + 1,) int, bounds of the sequences.
        config: settings of a planner made for this call; the defaults unless given.
        planner: makes the plan, or has begun it; unless given, one is made from `config`.

    Returns:
        tokens and labels (t,) int64 of this rank, and the shard. With fewer tokens than ranks,
        sequences of one token without a label are appended, so that every rank holds a token.
    """
    lengths = pad_to_ranks(np.diff(cu_seqlens), world.size)
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
            mine, here = share(lengths, world, own)
    else:
        mine, here = share(lengths, world, planner)
    return to_device(tokens[here], world.device), to_device(labels[here], world.device), mine


def share(lengths: np.ndarray, world: World, planner: Planner) -> tuple[Shard, np.ndarray]:
    """This rank's shard of sequences of these lengths, and where its tokens lie in the batch.

    Args:
        lengths: (N,) int, no fewer tokens than there are ranks.

    Returns:
        the shard, and int64 (t,).
    """
    made = planner.plan(lengths)
    view = View(made, world.rank, world.group, planner.config.attention, world.device)
    spans = made.stream.rows(world.rank)
    sequence, starts, ends = (
        column[spans] for column in (made.stream.sequence, made.stream.start, made.stream.end)
    )
    first = made.cu_seqlens[sequence] + starts
    sizes = ends - starts
    # (fragments,) -> (t,): the place in the batch of each of this rank's tokens.
    here = np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)
    return _shard(sizes, starts, world.device, view), here
