"""The stream: batches without end, each a function of (corpus, seed, cursor)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from data import packing
from data.config import DataConfig, StreamConfig
from data.corpus import Corpus
from data.order import ranks
from data.settings import ConfigError

IGNORED = -100  # the label of a token that predicts nothing


@dataclass(frozen=True)
class Cursor:
    """What has been read: enough to go on with the very next batch.

    A window of batches starts at token `offset` of the document at `position` in the
    endless order; `batch` batches of it have been given out, `batches` of all windows.
    """

    batches: int = 0
    position: int = 0
    offset: int = 0
    batch: int = 0

    def to_dict(self) -> dict[str, int]:
        """The fields, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, int]) -> Cursor:
        """The inverse of `to_dict`."""
        return cls(**fields)


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end.

    tokens: int64 (T,). labels: int64 (T,), the next token of the same sequence, IGNORED
    at each sequence's last token. cu_seqlens: int64 (N + 1,), from 0 to T. cursor: where
    the stream stands after this batch.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    cursor: Cursor = field(default_factory=Cursor)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of tokens and cu_seqlens."""
        digest = hashlib.blake2b(self.tokens.data, digest_size=16)
        digest.update(self.cu_seqlens.data)
        return digest.hexdigest()

    @property
    def targets(self) -> int:
        """Labels that count."""
        return len(self.tokens) - len(self.cu_seqlens) + 1


class Batches:
    """An endless iterator of batches.

    Args:
        corpus: the prepared corpus.
        stream: batch_tokens, seq_len and seed.
        data: the packing.
        start: the cursor to go on from.
    """

    def __init__(
        self, corpus: Corpus, stream: StreamConfig, data: DataConfig, start: Cursor | None = None
    ) -> None:
        if not len(corpus.by_length):
            raise ConfigError(f"{corpus.path} has no training documents")
        self.cursor = start or Cursor()
        self._ahead: Batch | None = None
        self._batches = _batches(corpus, stream, self.cursor)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.peek()
        self._ahead = None
        self.cursor = batch.cursor
        return batch

    def peek(self) -> Batch:
        """The next batch, left where it is."""
        if self._ahead is None:
            self._ahead = next(self._batches)
        return self._ahead

    def close(self) -> None:
        """Stop reading."""
        self._batches.close()


def validation_batches(
    corpus: Corpus, stream: StreamConfig, max_tokens: int | None = None
) -> Iterator[Batch]:
    """The held-out documents in their fixed order, cut at seq_len; the last batch is shorter."""
    starts, lengths = corpus.validation_spans(max_tokens)
    total = int(lengths.sum())
    if not total:
        return
    rows = packing.sequential(
        lengths, -(-total // stream.batch_tokens), stream.batch_tokens, stream.seq_len
    )
    rows = rows[rows[:, 1] < len(lengths)]
    yield from _cut(corpus, starts, rows, Cursor())


def _batches(corpus: Corpus, stream: StreamConfig, cursor: Cursor) -> Any:
    key = int(hashlib.blake2b(f"{corpus.fingerprint} {stream.seed}".encode()).hexdigest()[:16], 16)
    while True:
        window = max(16, (1 << 20) // stream.batch_tokens)
        starts, lengths, after = _documents(corpus, key, cursor, window * stream.batch_tokens)
        rows = packing.sequential(lengths, window, stream.batch_tokens, stream.seq_len)
        first = cursor.batches - cursor.batch
        for i, batch in enumerate(_cut(corpus, starts, rows, cursor, skip=cursor.batch)):
            done = cursor.batch + i + 1
            at = (
                Cursor(first + done, cursor.position, cursor.offset, done)
                if done < window
                else Cursor(first + done, *after, 0)
            )
            yield Batch(batch.tokens, batch.labels, batch.cu_seqlens, at)
        cursor = at


def _documents(
    corpus: Corpus, key: int, cursor: Cursor, tokens: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Spans of the next `tokens` tokens from the cursor's window on, and where they end."""
    count = len(corpus.by_length)
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    position, offset, missing = cursor.position, cursor.offset, tokens
    while missing > 0:
        block = np.arange(position, position + 4096)
        ids = corpus.by_length[ranks(block, count, key)]
        start = corpus.offsets[ids]
        length = corpus.offsets[ids + 1] - start
        start[0] += offset
        length[0] -= offset
        ends = np.cumsum(length)
        taken = int(np.searchsorted(ends, missing, side="left")) + 1
        starts.append(start[:taken])
        lengths.append(length[:taken].copy())
        if taken > len(block):
            missing -= int(ends[-1])
            position, offset = position + len(block), 0
            continue
        spare = int(ends[taken - 1]) - missing
        lengths[-1][-1] -= spare
        last = position + taken - 1
        whole = int(corpus.offsets[ids[taken - 1] + 1] - corpus.offsets[ids[taken - 1]])
        return (
            np.concatenate(starts),
            np.concatenate(lengths),
            (last + 1, 0) if spare == 0 else (last, whole - spare),
        )
    raise AssertionError("unreachable")


def _cut(
    corpus: Corpus, starts: np.ndarray, rows: np.ndarray, cursor: Cursor, skip: int = 0
) -> Iterator[Batch]:
    """The batches that `rows` (batch, document, length) describe, from batch `skip` on."""
    order = np.lexsort((rows[:, 0], rows[:, 1]))
    lengths = rows[order, 2]
    total = np.cumsum(lengths) - lengths
    document = rows[order, 1]
    first = np.searchsorted(document, np.arange(len(starts)))
    begin = np.empty(len(rows), dtype=np.int64)
    begin[order] = starts[document] + total - total[first[document]]
    edges = np.searchsorted(rows[:, 0], np.arange(rows[-1, 0] + 2))
    for batch in range(skip, int(rows[-1, 0]) + 1):
        span = slice(edges[batch], edges[batch + 1])
        tokens = corpus.gather(begin[span], rows[span, 2])
        cu_seqlens = np.concatenate([[0], np.cumsum(rows[span, 2])]).astype(np.int64)
        labels = np.empty_like(tokens)
        labels[:-1] = tokens[1:]
        labels[cu_seqlens[1:] - 1] = IGNORED
        yield Batch(tokens, labels, cu_seqlens, cursor)
