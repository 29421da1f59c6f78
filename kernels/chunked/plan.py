"""Where the chunks of packed sequences lie, and in which order they are computed.

The state passes from each chunk of a sequence to the next; different sequences are independent. So
step s computes the s-th chunk of every sequence that has one. Sequences are ordered by their number
of chunks, most first: then those of a step are a prefix of those of the step before. With three
sequences of 3, 2 and 1 chunks:

    step           0      1     2
    sequences    0 1 2   0 1    0

A *slab* is consecutive chunks in this order. What does not depend on the state is computed for a
whole slab at once, which is small enough for its temporaries to stay in a core's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels.chunked.decay import CHUNK


@dataclass(frozen=True)
class Slab:
    """Consecutive chunks of the plan. A *slot* is a row of a chunk, with a token or empty."""

    chunks: int
    sequences: slice  # those with a chunk here, in plan order
    steps: list[slice]  # the sequences of each of its steps, counted from `sequences.start`
    rows: Tensor | slice  # (chunks · C,) each slot's token; for an empty slot its sequence's last
    empty: Tensor | None  # the slots past the end of their sequence; None if there are none
    filled: Tensor | None  # the other slots; None if none are empty

    def load(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """(tokens, H, D) -> (chunks · heads, C, D): the slab's rows, zero in empty slots.

        Each of x's H heads is repeated heads / H times.
        """
        rows = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        if self.empty is not None:
            rows.index_fill_(0, self.empty, 0)
        # (chunks · C, H, D) -> (chunks, H, C, D)
        slots = rows.unflatten(0, (self.chunks, CHUNK)).transpose(1, 2).to(dtype)
        if x.shape[1] != heads:
            slots = slots.repeat_interleave(heads // x.shape[1], dim=1)
        return slots.contiguous().flatten(0, 1)

    def store(self, slots: Tensor, out: Tensor) -> None:
        """(chunks · heads, C, D) -> the slab's rows of `out` (tokens, H, D).

        Heads that `load` repeated are summed; empty slots are left out.
        """
        # (chunks · heads, C, D) -> (chunks, H, heads / H, C, D) -> (chunks, C, H, D)
        slots = slots.unflatten(0, (self.chunks, out.shape[1], -1))
        slots = (slots.squeeze(2) if slots.shape[2] == 1 else slots.sum(2)).transpose(1, 2)
        if isinstance(self.rows, slice):
            out[self.rows].unflatten(0, (self.chunks, CHUNK)).copy_(slots)
            return
        values, rows = slots.flatten(0, 1), self.rows  # (chunks · C, H, D)
        if self.filled is not None:
            values, rows = values.index_select(0, self.filled), rows.index_select(0, self.filled)
        out.index_copy_(0, rows, values.to(out.dtype))


@dataclass(frozen=True)
class Plan:
    order: Tensor  # (N,) int64, sequences, those with most chunks first
    slabs: list[Slab]
    tokens_in_sequences: int


@lru_cache(maxsize=4)  # all layers of a model ask for the plan of the same batch
def make_plan(cu_seqlens: tuple[int, ...], chunks_in_slab: int, device: torch.device) -> Plan:
    """The plan of N sequences with these N + 1 bounds; its tensors are on `device`."""
    bounds = torch.tensor(cu_seqlens)
    starts, lengths = bounds[:-1], bounds.diff()
    counts, order = ((lengths + CHUNK - 1) // CHUNK).sort(descending=True, stable=True)
    # (chunks,): each chunk's sequence, as its place in `order`, and its step.
    rank = torch.arange(len(counts)).repeat_interleave(counts)
    step = torch.arange(len(rank)) - (counts.cumsum(0) - counts)[rank]
    step, by_step = step.sort(stable=True)
    sequence = order[rank[by_step]]

    slot = torch.arange(CHUNK)
    used = (lengths[sequence] - step * CHUNK)[:, None]
    rows = (starts[sequence] + step * CHUNK)[:, None] + slot.minimum(used - 1)  # (chunks, C)
    empty = slot >= used

    slabs = []
    first = 0
    for steps in _grouped(torch.bincount(step).tolist(), chunks_in_slab):
        low, high = steps[0].start, max(piece.stop for piece in steps)
        chunks = sum(piece.stop - piece.start for piece in steps)
        here, holes = (
            rows[first : first + chunks].flatten(),
            empty[first : first + chunks].flatten(),
        )
        slabs.append(
            Slab(
                chunks=chunks,
                sequences=slice(low, high),
                steps=[slice(piece.start - low, piece.stop - low) for piece in steps],
                rows=(
                    slice(int(here[0]), int(here[-1]) + 1)
                    if (here.diff() == 1).all()
                    else here.to(device)
                ),
                empty=holes.nonzero().squeeze(-1).to(device) if holes.any() else None,
                filled=(~holes).nonzero().squeeze(-1).to(device) if holes.any() else None,
            )
        )
        first += chunks
    return Plan(order.to(device), slabs, int(lengths.sum()))


def _grouped(widths: list[int], most: int) -> list[list[slice]]:
    """Group steps into slabs of at most `most` chunks.

    A step with more chunks is cut into slabs of its own, so that no slab has chunks of more than
    `most` sequences.

    Args:
        widths: number of sequences of each step.

    Returns:
        for each slab, the sequences of each of its steps.
    """
    groups: list[list[slice]] = []
    room = 0
    for width in widths:
        for begin in range(0, width, most):
            piece = slice(begin, min(begin + most, width))
            if piece.stop - begin > room:
                groups.append([])
                room = most
            groups[-1].append(piece)
            room -= piece.stop - begin
        if width > most:
            room = 0
    return groups
