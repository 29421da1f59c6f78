"""Packing: which sequences lie in which batch of a window.

A window is a run of batches that is planned as a whole, from a run of documents with
exactly that many tokens. Every method returns rows of (batch, document, length), sorted by
batch and then by document; a document's rows, in that order, are its pieces in order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from data.config import Packing
from data.ordering.balance import CUTS, Cut, balanced, choose_cut
from data.ordering.order import mix


@dataclass(frozen=True)
class Packer:
    """One way of packing, settled for a corpus: the method, and the cut if it is balanced."""

    method: Packing
    batch_tokens: int
    seq_len: int
    cut: Cut = CUTS[0]

    @classmethod
    def fitted(
        cls, method: Packing, batch_tokens: int, seq_len: int, lengths: np.ndarray
    ) -> Packer:
        """The packer for documents like `lengths`, which sum to whole batches."""
        if method != "balanced":
            return cls(method, batch_tokens, seq_len)
        batches = int(lengths.sum()) // batch_tokens
        cut = choose_cut(lengths, batches, batch_tokens, seq_len)
        return cls(method, batch_tokens, seq_len, cut)

    def pack(self, lengths: np.ndarray, key: int) -> np.ndarray:
        """Pack documents into batches of exactly batch_tokens tokens.

        Args:
            lengths: int64 (documents,), each at least 1, summing to whole batches.
            key: decides the order of the batches, where the method leaves it open.

        Returns:
            int64 (sequences, 3): rows of batch, document, length.
        """
        batches = int(lengths.sum()) // self.batch_tokens
        if self.method == "sequential":
            return sequential(lengths, batches, self.batch_tokens, self.seq_len)
        if self.method == "best_fit":
            rows = best_fit(lengths, batches, self.batch_tokens, self.seq_len)
        else:
            deal = balanced(lengths, batches, self.batch_tokens, self.seq_len, self.cut)
            rows = np.stack([deal.batch, deal.document, deal.length], axis=1)
        # Longest-first packing leaves a trend over the batches; the order they come in has none.
        places = np.argsort(
            mix(np.arange(batches, dtype=np.uint64) + mix(np.full(1, key, dtype=np.uint64)))
        )
        rows[:, 0] = np.argsort(places)[rows[:, 0]]
        return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def loads(rows: np.ndarray, batches: int) -> np.ndarray:
    """float64 (batches,): Σ len² of each batch."""
    return np.bincount(rows[:, 0], rows[:, 2].astype(np.float64) ** 2, batches)


def sequential(lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int) -> np.ndarray:
    """Documents end to end, cut at every batch's edge and after every seq_len tokens."""
    ends = np.cumsum(lengths)
    edges = np.arange(1, batches + 1, dtype=np.int64) * batch_tokens
    count = -(-lengths // seq_len)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    pieces = np.repeat(ends - lengths, count) + nth * seq_len
    cuts = np.unique(np.concatenate([pieces[pieces > 0], ends, edges[edges < ends[-1]]]))
    starts = np.concatenate([[0], cuts[:-1]])
    return np.stack(
        [starts // batch_tokens, np.searchsorted(ends, starts, side="right"), cuts - starts],
        axis=1,
    )


def best_fit(lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int) -> np.ndarray:
    """Longest piece first, into the fullest batch with room (Ding et al., 2024).

    That paper pads what stays free. Here the pieces that found no room are cut to fill it,
    so that nothing is padded; `gaps` says how much that was.
    """
    rows, free, homeless = _fit(lengths, batches, batch_tokens, seq_len)
    for document, length in homeless:
        left = length
        while left:
            room, batch = free.pop()
            part = min(room, left)
            rows.append((batch, document, part))
            left -= part
            if room > part:
                insort(free, (room - part, batch))
    return np.array(rows, dtype=np.int64)


def gaps(lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int) -> int:
    """Tokens of padding that plain best fit would leave in these batches."""
    return sum(room for room, _ in _fit(lengths, batches, batch_tokens, seq_len)[1])


def _fit(
    lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows that fit, free room as rising (room, batch), and (document, length) that did not."""
    count = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    length = np.minimum(seq_len, lengths[document] - nth * seq_len)
    order = np.argsort(-length, kind="stable")
    free = [(batch_tokens, batch) for batch in range(batches)]
    rows: list[tuple[int, int, int]] = []
    homeless: list[tuple[int, int]] = []
    for owner, size in zip(document[order].tolist(), length[order].tolist(), strict=True):
        at = bisect_left(free, (size, -1))
        if at == len(free):
            homeless.append((owner, size))
            continue
        room, batch = free.pop(at)
        rows.append((batch, owner, size))
        if room > size:
            insort(free, (room - size, batch))
    return rows, free, homeless
