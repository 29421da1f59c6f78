"""The stream's windows: runs of batches that are packed as a whole.

A window begins where the cursor says that every deck stands, so nothing before it needs to
be looked at again, and any batch in it can be made from the plan alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from data.batch import Batch, Cursor, batch_of, begins
from data.config import DataConfig, StreamConfig
from data.ordering.mixture import Spans, Stage, decks, stages, take
from data.ordering.packing import Packer
from data.settings import ConfigError
from data.storing.corpus import Corpus

_WINDOW_TOKENS = 1 << 22
_MIN_BATCHES, _MAX_BATCHES = 16, 256


@dataclass(frozen=True)
class Window:
    """A planned run of batches.

    documents: what lies in it, before cutting. rows: (batch, document, length) as in
    `packing`. begin: where each row's tokens are stored. cursor: where its reader stands.
    end: its batches that are given out, fewer than were packed where a stage begins before.
    after: the cursor of the next window. accumulate: batches of a step.
    """

    documents: Spans
    deck: np.ndarray
    rows: np.ndarray
    begin: np.ndarray
    cursor: Cursor
    end: int
    after: Cursor
    stage: Stage
    accumulate: int

    def batches(self, corpus: Corpus) -> Iterator[Batch]:
        """The batches from the cursor on."""
        edges = np.searchsorted(self.rows[:, 0], np.arange(self.end + 1))
        for i in range(self.cursor.batch, self.end):
            span = slice(edges[i], edges[i + 1])
            done = self.cursor.later(i + 1 - self.cursor.batch, self.accumulate)
            yield batch_of(
                corpus,
                self.begin[span],
                self.rows[span, 2],
                done if i + 1 < self.end else self.after,
            )

    @property
    def passed_over(self) -> int:
        """Tokens of the window that are never given out, since a stage begins before them."""
        return int(self.rows[self.rows[:, 0] >= self.end, 2].sum())


class Plan:
    """Windows of the stream of a corpus under given settings; holds no position.

    A window that was begun before a stage was added, or moved by another `train.accumulate`,
    ends where that stage begins: the rest of it is passed over.
    """

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
        cursor = self._counted(cursor)
        if cursor.corpus not in (0, self._corpus):
            raise ConfigError(
                f"the cursor at batch {cursor.batches} belongs to another stream: the corpus, its "
                "tokenizer, train.seed or the splitting into sources is not the same; restore "
                "that, or start afresh"
            )
        if not cursor.shape:
            cursor = self._begun(cursor)
        shapes = {self._shape(stage): stage for stage in self.stages if stage.step <= cursor.steps}
        if cursor.shape not in shapes:
            raise ConfigError(
                f"the cursor at batch {cursor.batches} is inside a window that was packed with "
                "other values of train.batch_tokens, train.seq_len, data.packing or weights; "
                "restore them (to change them from a step on, use data.stages), or start afresh"
            )
        return self._window(cursor, shapes[cursor.shape])

    def _window(self, cursor: Cursor, stage: Stage) -> Window:
        start = cursor.batches - cursor.batch
        documents, deck, positions, offsets = self._documents(stage, start, cursor)
        if stage not in self._packers:
            self._packers[stage] = self._packer(stage)
        rows = self._packers[stage].pack(documents.length, cursor.shape ^ start)
        end = min(cursor.window, cursor.batch + self._until_next_stage(cursor))
        if self._shape(self._stage(cursor.steps)) != cursor.shape:
            end = cursor.batch
        after = cursor.later(end - cursor.batch, self.stream.accumulate)
        if end:  # a window of which nothing was given out leaves the decks where they are
            after = replace(after, positions=positions, offsets=offsets)
        return Window(
            documents,
            deck,
            rows,
            begins(documents, rows),
            cursor,
            end,
            self._begun(after),
            stage,
            self.stream.accumulate,
        )

    def _counted(self, cursor: Cursor) -> Cursor:
        """A cursor with its steps, also one from before cursors had them."""
        accumulate = self.stream.accumulate
        if not cursor.steps and not cursor.part:
            cursor = replace(cursor, part=cursor.batches)
        steps, part = divmod(cursor.part, accumulate)
        return replace(cursor, steps=cursor.steps + steps, part=part)

    def _begun(self, cursor: Cursor) -> Cursor:
        """The cursor at the start of the window that follows it."""
        nothing = (0,) * len(self.decks)
        return replace(
            cursor,
            batch=0,
            window=min(self._full_length(), self._until_next_stage(cursor)),
            positions=cursor.positions or nothing,
            offsets=cursor.offsets or nothing,
            corpus=self._corpus,
            shape=self._shape(self._stage(cursor.steps)),
        )

    def _stage(self, step: int) -> Stage:
        """The stage in force at a step."""
        return [stage for stage in self.stages if stage.step <= step][-1]

    def _until_next_stage(self, cursor: Cursor) -> int:
        """Batches up to the start of the next stage; no window goes across it."""
        later = [stage.step for stage in self.stages if stage.step > cursor.steps]
        steps = later[0] - cursor.steps if later else 1 << 60
        return steps * self.stream.accumulate - cursor.part

    def _full_length(self) -> int:
        """Batches of a window that nothing cuts short: an epoch at most."""
        epoch = sum(deck.tokens for deck in self.decks)
        size = self.stream.batch_tokens
        wanted = min(max(_WINDOW_TOKENS // size, _MIN_BATCHES), _MAX_BATCHES)
        return max(min(wanted, epoch // size), 1)

    def _documents(
        self, stage: Stage, start: int, cursor: Cursor
    ) -> tuple[Spans, np.ndarray, tuple[int, ...], tuple[int, ...]]:
        """What the window from batch `start` on holds: the documents, and the deck of each.

        Then where the decks stand after it.
        """
        size = self.stream.batch_tokens
        quotas = stage.quotas(start * size, cursor.window * size)
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
        documents = self._documents(stage, 0, window)[0]
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
