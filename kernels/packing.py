"""Where sequences begin and end in a batch: the same rule for every op.

Without `cu_seqlens` a batch (B, T, …) is B sequences of T rows. With it, B is 1 and the T rows hold
N sequences end to end; rows at or past `cu_seqlens[-1]` belong to no sequence. Either way the ops
see one stream of B · T rows and N + 1 bounds: (B, T, …) -> (B · T, …).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def check_cu_seqlens(batch: int, cu_seqlens: Tensor | None) -> int:
    """The number of sequences. Reads no value, so no device is waited for.

    Raises:
        ValueError: `cu_seqlens` has the wrong shape or dtype, or the batch is not 1.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 (sequences laid end to end); B is {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be (N + 1,) int; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    return len(cu_seqlens) - 1


def host_bounds(batch: int, length: int, cu_seqlens: Tensor | None) -> list[int]:
    """N + 1 bounds as ints: sequence n is rows [b[n], b[n + 1]) of the stream.

    Waits for the device that holds `cu_seqlens`.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to at most `length`.
    """
    if cu_seqlens is None:
        return [b * length for b in range(batch + 1)]
    bounds: list[int] = cu_seqlens.tolist()
    rising = all(a <= b for a, b in pairwise(bounds))
    if bounds[0] != 0 or not rising or bounds[-1] > length:
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most {length}, the rows of the batch; got "
            f"{bounds if len(bounds) <= 16 else [*bounds[:8], '…', *bounds[-8:]]}"
        )
    return bounds


def device_bounds(
    batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """The same bounds as (N + 1,) int64 on `device`, for kernels."""
    if cu_seqlens is None:
        return torch.arange(batch + 1, device=device) * length
    return cu_seqlens.to(device=device, dtype=torch.int64)


class Block(NamedTuple):
    """Rows [start, end) of the stream, all of one sequence: what a CPU path computes at a time.

    `first` and `last` say whether they begin, and end, the sequence.
    """

    sequence: int
    start: int
    end: int
    first: bool
    last: bool


def blocks(bounds: list[int], rows: int) -> Iterator[Block]:
    """Cut every sequence into blocks of at most `rows` rows, in the order of the stream."""
    for n, (begin, end) in enumerate(pairwise(bounds)):
        for start in range(begin, end, rows):
            stop = min(start + rows, end)
            yield Block(n, start, stop, start == begin, stop == end)


def gradient_like(gradient: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A gradient (tokens, …) in the shape and dtype of its input x."""
    if gradient is None or x is None:
        return None
    if x.dim() == 1:  # a number a head, the same for all tokens: (tokens, H) -> (H,)
        gradient = gradient.sum(0)
    return gradient.reshape(x.shape).to(x.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, states and sums: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
