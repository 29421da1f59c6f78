"""Where the chunks of packed sequences lie, computed on the device: the CPU never waits for it."""

from __future__ import annotations

import weakref
from collections import deque
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.packing import device_bounds
from kernels.triton.tiles import CHUNK


class Layout(NamedTuple):
    """Where sequences and their chunks lie in the stream of tokens; tensors on the device.

    The CPU does not know how many chunks there are, so there are as many slots as there can be, and
    the last ones may be empty.
    """

    bounds: Tensor  # (N + 1,) int64, rows at which sequences begin and end
    first_chunks: Tensor  # (N,) int64, slot of each sequence's first chunk
    chunks: Tensor  # (slots, 2) int64, first row and number of rows of each chunk


# Layouts of the last 8 tensors `cu_seqlens`: a model's layers share one, forward and backward.
# An entry is (tensor, its version, length, device, layout).
_recent: deque[tuple[weakref.ref[Tensor], int, int, torch.device, Layout]] = deque(maxlen=8)


def lay_out(batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
    """The layout of a batch, made without waiting for the device.

    It takes a dozen small launches, as many as a layer's own: so the layout made for the same
    tensor, unchanged since, is returned again.
    """
    if cu_seqlens is None:
        return _even(batch, length, device)
    wanted = (cu_seqlens._version, length, device)
    for known, *of, layout in tuple(_recent):
        if known() is cu_seqlens and tuple(of) == wanted:
            return layout
    layout = _cut(batch, length, cu_seqlens, device)
    _recent.append((weakref.ref(cu_seqlens), *wanted, layout))
    return layout


@lru_cache(maxsize=32)
def _even(batch: int, length: int, device: torch.device) -> Layout:
    return _cut(batch, length, None, device)


def _cut(batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
    bounds = device_bounds(batch, length, cu_seqlens, device)
    C = CHUNK.value
    N = len(bounds) - 1
    counts = (bounds.diff() + C - 1) // C
    ends = counts.cumsum(0)
    first_chunks = ends - counts
    if N == 0:
        return Layout(bounds, first_chunks, bounds.new_zeros(0, 2))
    # Packed: every sequence has at most one chunk that is not full.
    slots = batch * (-(-length // C)) if cu_seqlens is None else length // C + N
    slot = torch.arange(slots, device=device)
    sequence = torch.searchsorted(ends, slot, right=True)
    used = sequence < N
    sequence = sequence.clamp(max=N - 1)
    start = bounds[sequence] + (slot - first_chunks[sequence]) * C
    rows = (bounds[sequence + 1] - start).clamp(max=C)
    chunks = torch.stack([start, rows], dim=1) * used[:, None]
    return Layout(bounds, first_chunks, chunks)
