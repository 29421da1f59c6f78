"""The stream: batches without end, each a function of (corpus, settings, cursor)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from data.batch import Batch, Cursor, batch_of, begins
from data.config import DataConfig, StreamConfig
from data.ordering.mixture import Spans
from data.ordering.packing import sequential
from data.ordering.plan import Plan, Window
from data.storing.corpus import Corpus
from data.storing.held_out import HeldOutDocuments

_AHEAD = 4  # batches made before they are asked for


class Batches:
    """An endless iterator of batches, made ahead by a thread.

    Args:
        corpus: the prepared corpus.
        stream: batch_tokens, seq_len, seed.
        data: packing, weights and stages.
        start: the cursor to go on from.

    Attributes:
        cursor: after the last batch that was taken.
        passed_over: tokens that were packed into the window of the start and are never given
            out, since a stage begins before them that was added or moved since.

    Raises:
        ConfigError: if the cursor belongs to another corpus or other settings.
    """

    def __init__(
        self, corpus: Corpus, stream: StreamConfig, data: DataConfig, start: Cursor | None = None
    ) -> None:
        self.cursor = start or Cursor()
        self.plan = Plan(corpus, stream, data)
        self._next: Batch | None = None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        # The first window is planned here, so that what is wrong with it is raised here.
        window = self.plan.window(self.cursor)
        self.passed_over = window.passed_over
        self._packed = window
        self._thread = threading.Thread(target=self._produce, args=(window,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.peek()
        self._next = None
        self.cursor = batch.cursor
        return batch

    def peek(self) -> Batch:
        """The next batch, left where it is."""
        if self._next is None:
            made = self._queue.get()
            if isinstance(made, BaseException):
                self._queue.put(made)
                raise made
            self._next = made
        return self._next

    @property
    def promised(self) -> str:
        """Digest of the batch that the window of the start packed next.

        The first one given out has it, unless a stage begins there of which nothing was known.
        """
        following = replace(self._packed, end=self._packed.cursor.batch + 1)
        return next(following.batches(self.plan.corpus)).digest

    def close(self) -> None:
        """Stop the thread; the iterator cannot be used afterwards."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue

    def _produce(self, window: Window) -> None:
        try:
            while True:
                for batch in window.batches(self.plan.corpus):
                    if self._closed.is_set():
                        return
                    self._queue.put(batch)
                window = self.plan.window(window.after)
        except BaseException as error:
            self._queue.put(error)


def validation_batches(
    corpus: HeldOutDocuments, stream: StreamConfig, max_tokens: int | None = None
) -> Iterator[Batch]:
    """The held-out documents in their fixed order, cut at seq_len; the last batch is shorter, and
    left out if it has nothing to predict."""
    starts, lengths = corpus.validation_spans(max_tokens)
    total = int(lengths.sum())
    if not total:
        return
    size = stream.batch_tokens
    rows = sequential(lengths, -(-total // size), size, stream.seq_len)
    begin = begins(Spans(starts, lengths), rows)
    edges = np.searchsorted(rows[:, 0], np.arange(-(-total // size) + 1))
    for first, last in pairwise(edges):
        batch = batch_of(corpus, begin[first:last], rows[first:last, 2], Cursor())
        if batch.targets:
            yield batch
