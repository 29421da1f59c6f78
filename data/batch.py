"""Batches, and the cursors that say what has been read."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from data.ordering.mixture import Spans
from data.storing.held_out import HeldOutDocuments

IGNORED = -100  # the label of a token that predicts nothing


@dataclass(frozen=True)
class Cursor:
    """What has been read: enough to go on with the very next batch.

    batches: given out since the start. steps, part: optimiser steps that these were, and
    batches of the step that is under way. batch, window: of the current window, given out
    and planned. positions, offsets: where each deck stood at the start of the window.
    corpus: a digest of the corpus and its order. shape: a digest of what shaped the window;
    0 before the first.
    """

    batches: int = 0
    steps: int = 0
    part: int = 0
    batch: int = 0
    window: int = 0
    positions: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    corpus: int = 0
    shape: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a checkpoint; tuples become lists of integers."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Cursor:
        """The inverse of `to_dict`."""
        made: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()
        }
        return cls(**made)

    def later(self, batches: int, accumulate: int) -> Cursor:
        """The cursor after so many more batches of the window, `accumulate` of them a step."""
        steps, part = divmod(self.part + batches, accumulate)
        return replace(
            self,
            batches=self.batches + batches,
            steps=self.steps + steps,
            part=part,
            batch=self.batch + batches,
        )


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

    @cached_property
    def targets(self) -> int:
        """Labels that count."""
        return int(np.count_nonzero(self.labels != IGNORED))


def begins(documents: Spans, rows: np.ndarray) -> np.ndarray:
    """int64 (sequences,): where each row's tokens start; a document's rows follow each other."""
    order = np.argsort(rows[:, 1], kind="stable")
    document, length = rows[order, 1], rows[order, 2]
    before = np.cumsum(length) - length
    first = np.searchsorted(document, document, side="left")
    begin = np.empty(len(rows), dtype=np.int64)
    begin[order] = documents.start[document] + before - before[first]
    return begin


def batch_of(
    corpus: HeldOutDocuments, begin: np.ndarray, length: np.ndarray, cursor: Cursor
) -> Batch:
    tokens = corpus.gather(begin, length)
    cu_seqlens = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=cu_seqlens[1:])
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[cu_seqlens[1:] - 1] = IGNORED
    return Batch(tokens, labels, cu_seqlens, cursor)
