"""The stream: batches without end, each a function of (corpus, settings, cursor).

The stream is planned window by window: a run of batches that is packed as a whole. A
window begins where the cursor says that every deck stands, so nothing before it needs to
be looked at again, and any batch in it can be made from the plan alone.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from data.config import DataConfig, StreamConfig
from data.corpus import Corpus
from data.held_out import HeldOutDocuments
from data.mixture import Spans, Stage, decks, stages, take
from data.packing import Packer, sequential
from data.settings import ConfigError

IGNORED = -100  # the label of a token that predicts nothing
_WINDOW_TOKENS = 1 << 22
_MIN_BATCHES, _MAX_BATCHES = 16, 256
_AHEAD = 4  # batches made before they are asked for


@dataclass(frozen=True)
class Cursor:
    """What has been read: enough to go on with the very next batch.

    batches: given out since the start. batch, window: of the current window, given out
    and planned. positions, offsets: where each deck stood at the start of the window.
    corpus: a digest of the corpus and its order. shape: a digest of what shaped the window;
    0 between windows, where it may change.
    """

    batches: int = 0
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


@dataclass(frozen=True)
class Window:
    """A planned run of batches.

    documents: what lies in it, before cutting. rows: (batch, document, length) as in
    `packing`. begin: where each row's tokens are stored. cursor: before its first batch.
    after: the cursor of the next window.
    """

    documents: Spans
    deck: np.ndarray
    rows: np.ndarray
    begin: np.ndarray
    cursor: Cursor
    after: Cursor
    stage: Stage

    def batches(self, corpus: Corpus, first: int) -> Iterator[Batch]:
        """The batches from number `first` of the window on."""
        count = int(self.rows[-1, 0]) + 1
        edges = np.searchsorted(self.rows[:, 0], np.arange(count + 1))
        for i in range(first, count):
            span = slice(edges[i], edges[i + 1])
            done = replace(self.cursor, batches=self.cursor.batches + i + 1, batch=i + 1)
            yield _batch(
                corpus, self.begin[span], self.rows[span, 2], done if i + 1 < count else self.after
            )


class Plan:
    """Windows of the stream of a corpus under given settings; holds no position."""

    def __init__(self, corpus: Corpus, stream: StreamConfig, data: DataConfig) -> None:
        self.corpus = corpus
        self.stream = stream
        self.data = data
        self.decks = decks(corpus, data, stream.seed)
        self.stages = stages(corpus, self.decks, data, stream)
        self._packers: dict[Stage, Packer] = {}
        # A deck's key is made from the corpus's fingerprint, the seed and the source.
        self._corpus = _number([(deck.key, deck.first, deck.last) for deck in self.decks])

    @property
    def key(self) -> int:
        """`Cursor.corpus` of the cursors of this stream."""
        return self._corpus

    def window(self, cursor: Cursor) -> Window:
        """The window that `cursor` stands in.

        Raises:
            ConfigError: if the window was begun under other settings.
        """
        start = cursor.batches - cursor.batch
        number = max(i for i, stage in enumerate(self.stages) if stage.start <= start)
        stage = self.stages[number]
        if cursor.corpus not in (0, self._corpus):
            raise ConfigError(
                f"the cursor at batch {cursor.batches} belongs to another stream: the corpus, its "
                "tokenizer, train.seed or the splitting into sources is not the same; restore "
                "that, or start afresh"
            )
        shape = self._shape(stage)
        if cursor.shape not in (0, shape):
            raise ConfigError(
                f"the cursor at batch {cursor.batches} is inside a window that was packed with "
                "other values of train.batch_tokens, train.seq_len, data.packing or weights; "
                "restore them (to change them from a step on, use data.stages), or start afresh"
            )
        length = cursor.window if cursor.batch else self._length(number, start)
        nothing = (0,) * len(self.decks)
        cursor = replace(
            cursor,
            batches=start,
            batch=0,
            window=length,
            positions=cursor.positions or nothing,
            offsets=cursor.offsets or nothing,
            corpus=self._corpus,
            shape=shape,
        )
        documents, deck, positions, offsets = self._documents(stage, cursor)
        if stage not in self._packers:
            self._packers[stage] = self._packer(stage)
        rows = self._packers[stage].pack(documents.length, shape ^ start)
        after = Cursor(
            batches=start + length, positions=positions, offsets=offsets, corpus=self._corpus
        )
        return Window(documents, deck, rows, _begin(documents, rows), cursor, after, stage)

    def _length(self, number: int, start: int) -> int:
        """Batches of a window that starts at batch `start`: none across the start of a stage."""
        if number + 1 < len(self.stages):
            return min(self._full_length(), self.stages[number + 1].start - start)
        return self._full_length()

    def _full_length(self) -> int:
        """Batches of a window that nothing cuts short: an epoch at most."""
        epoch = sum(deck.tokens for deck in self.decks)
        size = self.stream.batch_tokens
        wanted = min(max(_WINDOW_TOKENS // size, _MIN_BATCHES), _MAX_BATCHES)
        return max(min(wanted, epoch // size), 1)

    def _documents(
        self, stage: Stage, cursor: Cursor
    ) -> tuple[Spans, np.ndarray, tuple[int, ...], tuple[int, ...]]:
        """What a window holds, the deck of each document, and where the decks stand after it."""
        size = self.stream.batch_tokens
        quotas = stage.quotas(cursor.batches * size, cursor.window * size)
        taken = [
            take(self.corpus, deck, position, offset, quota)
            for deck, position, offset, quota in zip(
                self.decks, cursor.positions, cursor.offsets, quotas, strict=True
            )
        ]
        spans = [spans for spans, _, _ in taken]
        return (
            Spans(
                np.concatenate([s.start for s in spans]), np.concatenate([s.length for s in spans])
            ),
            np.repeat(np.arange(len(spans)), [len(s.start) for s in spans]),
            tuple(position for _, position, _ in taken),
            tuple(offset for _, _, offset in taken),
        )

    def _packer(self, stage: Stage) -> Packer:
        """A stage's packer is fitted to what a window at the very start would hold."""
        nothing = (0,) * len(self.decks)
        window = Cursor(window=self._full_length(), positions=nothing, offsets=nothing)
        documents = self._documents(stage, window)[0]
        return Packer.fitted(
            self.data.packing, self.stream.batch_tokens, stage.seq_len, documents.length
        )

    def _shape(self, stage: Stage) -> int:
        return _number(
            self.stream.batch_tokens, stage.seq_len, self.data.packing, stage.weights, self._corpus
        )


def _number(*values: object) -> int:
    """A digest as an integer above 0."""
    return int(hashlib.blake2b(repr(values).encode(), digest_size=7).hexdigest(), 16) + 1


class Batches:
    """An endless iterator of batches, made ahead by a thread.

    Args:
        corpus: the prepared corpus.
        stream: batch_tokens, seq_len, seed.
        data: packing, weights and stages.
        start: the cursor to go on from.

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
        self._thread = threading.Thread(
            target=self._produce, args=(window, self.cursor.batch), daemon=True
        )
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

    def close(self) -> None:
        """Stop the thread; the iterator cannot be used afterwards."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue

    def _produce(self, window: Window, first: int) -> None:
        try:
            while True:
                for batch in window.batches(self.plan.corpus, first):
                    if self._closed.is_set():
                        return
                    self._queue.put(batch)
                window, first = self.plan.window(window.after), 0
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
    begin = _begin(Spans(starts, lengths), rows)
    edges = np.searchsorted(rows[:, 0], np.arange(-(-total // size) + 1))
    for first, last in pairwise(edges):
        batch = _batch(corpus, begin[first:last], rows[first:last, 2], Cursor())
        if batch.targets:
            yield batch


def _begin(documents: Spans, rows: np.ndarray) -> np.ndarray:
    """int64 (sequences,): where each row's tokens start; a document's rows follow each other."""
    order = np.argsort(rows[:, 1], kind="stable")
    document, length = rows[order, 1], rows[order, 2]
    before = np.cumsum(length) - length
    first = np.searchsorted(document, document, side="left")
    begin = np.empty(len(rows), dtype=np.int64)
    begin[order] = documents.start[document] + before - before[first]
    return begin


def _batch(
    corpus: HeldOutDocuments, begin: np.ndarray, length: np.ndarray, cursor: Cursor
) -> Batch:
    tokens = corpus.gather(begin, length)
    cu_seqlens = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=cu_seqlens[1:])
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[cu_seqlens[1:] - 1] = IGNORED
    return Batch(tokens, labels, cu_seqlens, cursor)
