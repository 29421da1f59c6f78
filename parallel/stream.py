"""One stream: the sequences of a batch laid end to end and cut over the ranks.

Today the cuts lie between sequences, so that no layer needs anything from another rank;
the layers already go through this room (`parallel.layers`), which is where a cut inside a
sequence will be served.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.world import World


@dataclass(frozen=True)
class Shard:
    """The part of a stream that one rank holds.

    Attributes:
        lengths: tokens of each fragment, on the host: no device is asked for them.
        cu_seqlens: (N + 1,) int32 on the device, the same in cumulative form.
        positions: (T,) int64 on the device, each token's position in its sequence.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def shard(lengths: Sequence[int] | np.ndarray, device: torch.device | str, start: int = 0) -> Shard:
    """A shard of whole sequences; `start` is the position of each one's first token."""
    each = np.asarray(lengths, dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(each)])
    positions = start + np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], each)
    return Shard(
        lengths=tuple(int(length) for length in each),
        cu_seqlens=_to_device(cu_seqlens.astype(np.int32), torch.device(device)),
        positions=_to_device(positions, torch.device(device)),
    )


def cut(cu_seqlens: np.ndarray, ranks: int) -> list[tuple[int, int]]:
    """Deal a stream's sequences out to `ranks`, in order and whole.

    Args:
        cu_seqlens: (N + 1,) int, the stream's sequences in cumulative form.
        ranks: how many shards to make.

    Returns:
        For each rank the half-open range (first, end) of its sequences. Each cut is the
        boundary nearest to the even one, so shards differ by less than the longest
        sequence; a rank's range may be empty.
    """
    even = np.arange(1, ranks) * (int(cu_seqlens[-1]) / ranks)
    after = np.searchsorted(cu_seqlens, even)
    before = np.maximum(after - 1, 0)
    nearer = even - cu_seqlens[before] <= cu_seqlens[after] - even
    inner = np.where(nearer, before, after)
    bounds = [0, *(int(bound) for bound in inner), len(cu_seqlens) - 1]
    return list(itertools.pairwise(bounds))


def distribute(
    tokens: np.ndarray, labels: np.ndarray, cu_seqlens: np.ndarray, world: World
) -> tuple[Tensor, Tensor, Shard]:
    """This rank's part of a stream, on its device.

    Args:
        tokens, labels: (T,) int64, the whole stream; labels are shifted already, −100 for none.
        cu_seqlens: (N + 1,) int.

    Returns:
        tokens and labels (t,) int64 of this rank's shard, and the shard. A rank that gets no
        sequence holds one token without a label: it takes part in every collective and
        changes no gradient.
    """
    first, end = cut(cu_seqlens, world.size)[world.rank]
    here = slice(int(cu_seqlens[first]), int(cu_seqlens[end]))
    lengths = np.diff(cu_seqlens[first : end + 1])
    tokens, labels = tokens[here], labels[here]
    if not len(tokens):
        tokens, labels, lengths = np.zeros(1, np.int64), np.full(1, -100), np.ones(1, np.int64)
    return (
        _to_device(tokens, world.device),
        _to_device(labels, world.device),
        shard(lengths, world.device),
    )


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, so that a GPU need not be waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.clone()
