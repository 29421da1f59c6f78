"""What a run trains on: prepared text, or a task whose batches are made on the spot.

Both are a stream of batches that goes on from any cursor, a validation set and a tokenizer;
whoever trains or evaluates need not know which it is.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from data.batch import Batch, Cursor
from data.config import RECALL, DataConfig, StreamConfig
from data.ordering.plan import Plan
from data.prepare import Log, prepare
from data.probes import TextProbes
from data.recall import Recall
from data.storing.corpus import Corpus
from data.storing.held_out import HeldOutDocuments
from data.stream import Batches, validation_batches
from data.tokens.tokenizer import Tokenizer

_LITTLE = 1024  # bytes of text that are too few for a compressor to learn from


class Stream(Protocol):
    """An endless iterator of batches.

    passed_over: tokens that are left out since a stage begins earlier than it was planned.
    """

    passed_over: int

    @property
    def promised(self) -> str:
        """Digest of the batch that the start's cursor was to go on with."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def peek(self) -> Batch:
        """The next batch, left where it is."""

    def close(self) -> None:
        """Let go of what is held; the iterator cannot be used afterwards."""


class HeldOut(Protocol):
    """What a model is measured on, and training never sees."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def validation(self, max_tokens: int, seq_len: int | None = None) -> Iterator[Batch]:
        """Up to `max_tokens` that training never sees, in sequences of up to `seq_len` tokens
        (None: those of training)."""

    def recall_probe(
        self, random: np.random.Generator, count: int, length: int, pairs: int, queries: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Sequences that show pairs of a key and a value, then ask for some of the values.

        Returns:
            tokens and labels, int64 (count, length), IGNORED but where a value is asked for;
            None if they do not fit.
        """

    def needle_probe(
        self, random: np.random.Generator, count: int, length: int, depth: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Sequences that ask at their end for what was shown once, at `depth` from 0 to 1.

        Returns:
            As `recall_probe`.
        """


class Material(HeldOut, Protocol):
    """What a run trains on, and what is held out of it."""

    @property
    def key(self) -> int:
        """`Cursor.corpus` of the cursors of its stream."""

    def batches(self, start: Cursor) -> Stream:
        """The training batches that follow `start`.

        Raises:
            ConfigError: `start` belongs to another stream.
        """

    def bar(self, max_tokens: int) -> tuple[str, str, float] | None:
        """What a known bar makes of `validation`: the metric, who, and how much.

        None if there is too little of it to say.
        """

    def report(self) -> tuple[str, Any]:
        """What there is to learn from, in words and as a matplotlib figure, if there is one."""


@dataclass(frozen=True)
class HeldOutText:
    """The held-out documents of a corpus, or of a text in memory, under given settings."""

    corpus: HeldOutDocuments
    stream: StreamConfig

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    def validation(self, max_tokens: int, seq_len: int | None = None) -> Iterator[Batch]:
        length = seq_len or self.stream.seq_len
        size = max(self.stream.batch_tokens, length)
        return validation_batches(
            self.corpus, replace(self.stream, batch_tokens=size, seq_len=length), max_tokens
        )

    def recall_probe(
        self, random: np.random.Generator, count: int, length: int, pairs: int, queries: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Pairs of words, held-out text, then words of the pairs with their values."""
        return self._probes.recall(random, count, length, pairs, queries)

    def needle_probe(
        self, random: np.random.Generator, count: int, length: int, depth: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Held-out text with a sentence of random words in it, which the end begins anew."""
        return self._probes.needle(random, count, length, depth)

    @cached_property
    def _probes(self) -> TextProbes:
        return TextProbes(self.corpus)


@dataclass(frozen=True)
class Text(HeldOutText):
    """A prepared corpus under given settings."""

    corpus: Corpus
    data: DataConfig

    @property
    def key(self) -> int:
        return Plan(self.corpus, self.stream, self.data).key

    def batches(self, start: Cursor) -> Batches:
        return Batches(self.corpus, self.stream, self.data, start)

    def bar(self, max_tokens: int) -> tuple[str, str, float] | None:
        """Bits a byte of the validation text under `xz -9`, which everyone knows.

        Its frame of some 60 bytes is left out: it is much of what little text is packed to.
        """
        text = self.corpus.validation_text(max_tokens).encode()
        if len(text) < _LITTLE:
            return None
        code = {"id": lzma.FILTER_LZMA2, "preset": 9}
        packed = lzma.compress(text, lzma.FORMAT_RAW, filters=[code])
        return "val_bpb", "xz -9", 8 * len(packed) / len(text)

    def report(self) -> tuple[str, Any]:
        from data import stats

        made = stats.report(self.corpus, self.stream, self.data)
        return stats.text(made), stats.figure(made)


def material(data: DataConfig, stream: StreamConfig, log: Log = lambda line: None) -> Material:
    """What the settings name, prepared if it is text that was not.

    Raises:
        ConfigError: as `prepare` or `Recall`.
    """
    if data.source == RECALL:
        return Recall(data.recall, stream)
    return Text(prepare(data, log), stream, data)
