"""Multi-query associative recall: batches made on the spot, to see what a mixer can remember.

After Zoology (Arora et al. 2023, arXiv 2312.04927). A sequence shows n pairs of a key and a
value, then asks for some of them, each at a place of its own:

    ·  k₁ v₁ k₂ v₂ … kₙ vₙ   · k₃ · · k₁ kₙ · k₃ ·

The label of a key that is shown again is its value, which is not shown; no other token has a
label. A batch is a function of (settings, seed, number), so that a cursor is a number and
nothing is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.config import RecallConfig, StreamConfig
from data.settings import ConfigError
from data.stream import IGNORED, Batch, Cursor

_TRAINING, _VALIDATION = 0, 1


def sequences(
    random: np.random.Generator,
    count: int,
    length: int,
    pairs: int,
    queries: int,
    keys: np.ndarray,
    values: np.ndarray,
    blank: int,
    power: float | None = None,
    fewest: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of the task.

    Args:
        random: what is drawn from; the same state gives the same sequences.
        count: how many.
        length: tokens of each, at least `shortest(pairs, queries)`.
        pairs: shown at the start, with different keys.
        queries: asked after them, each for any pair.
        keys, values: the tokens to choose from.
        blank: the token of the start and of every place that asks nothing.
        power: a query's place, counted from 1 after the pairs, has a probability in
            proportion to place^(power − 1), as in Zoology; None takes all places alike.
        fewest: each sequence's number of pairs is drawn from `fewest` to `pairs`, every
            octave alike, with blanks for the others; None leaves all there.

    Returns:
        tokens and labels, int64 (count, length); a label is the value of a query's key, and
        IGNORED everywhere else.

    Raises:
        ValueError: the sequence is too short, or there are fewer keys than pairs.
    """
    if length < shortest(pairs, queries) or pairs > len(keys):
        raise ValueError(
            f"{pairs} pairs of {len(keys)} keys and {queries} queries do not fit into {length} "
            f"tokens; they need {shortest(pairs, queries)}"
        )
    rows = np.arange(count)[:, None]
    key = random.permuted(np.tile(keys, (count, 1)), axis=1)[:, :pairs]
    value = random.choice(values, (count, pairs))
    shown = np.full(count, pairs)
    if fewest is not None:
        octaves = random.uniform(np.log(fewest), np.log(pairs + 1), count)
        shown = np.exp(octaves).astype(np.int64)
    there = np.arange(pairs) < shown[:, None]
    tokens = np.full((count, length), blank, dtype=np.int64)
    labels = np.full((count, length), IGNORED, dtype=np.int64)
    first = 1 + 2 * pairs
    tokens[:, 1:first:2] = np.where(there, key, blank)
    tokens[:, 2:first:2] = np.where(there, value, blank)
    # The largest of log p plus Gumbel noise: a draw of places without replacement.
    score = random.gumbel(size=(count, length - first))
    if power is not None:
        score += (power - 1) * np.log(np.arange(1, length - first + 1))
    place = first + np.argpartition(-score, queries - 1, axis=1)[:, :queries]
    asked = random.integers(0, shown[:, None], (count, queries))
    tokens[rows, place], labels[rows, place] = key[rows, asked], value[rows, asked]
    return tokens, labels


def shortest(pairs: int, queries: int) -> int:
    """Tokens of a sequence without a blank but the first."""
    return 1 + 2 * pairs + queries


class Numbers:
    """The tokenizer of the task: a token's text is its number.

    0 is the blank, which also starts a sequence; then come the keys, then the values.
    """

    bos_id, eos_id = 0, -1
    end_ids: frozenset[int] = frozenset()
    byte_runs: frozenset[int] = frozenset()
    file = "numbers.json"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.model = json.dumps({"vocab_size": vocab_size}).encode()

    def encode(self, text: str) -> list[int]:
        """The tokens that `text` lists, with spaces between.

        Raises:
            ConfigError: a word of it is no number, or too large a one.
        """
        words = text.split()
        for word in words:
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise ConfigError(
                    f"{word!r} is no token of the recall task; they are the numbers from 0 to "
                    f"{self.vocab_size - 1}"
                )
        return [int(word) for word in words]

    def decode(self, tokens: Iterable[int]) -> str:
        """The numbers, with spaces between."""
        return " ".join(str(token) for token in tokens)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64 zeros: a token stands for no text, so bits a byte mean nothing."""
        return np.zeros(self.vocab_size, dtype=np.int64)


@dataclass(frozen=True)
class Recall:
    """The task as something to train on (`data.material`).

    Raises:
        ConfigError: sequences are too short for it, or batches no whole number of them.
    """

    recall: RecallConfig
    stream: StreamConfig

    def __post_init__(self) -> None:
        size, length = self.stream.batch_tokens, self.stream.seq_len
        if size % length:
            raise ConfigError(
                f"train.batch_tokens is {size}; with data.source: recall it must be a multiple "
                f"of train.seq_len, {length}"
            )
        self._check(length)

    @property
    def tokenizer(self) -> Numbers:
        return Numbers(1 + self.recall.keys + self.recall.values)

    def batches(self, start: Cursor) -> RecallBatches:
        """The batches that follow `start`.

        Raises:
            ConfigError: `start` belongs to other settings.
        """
        return RecallBatches(self, start)

    def validation(self, max_tokens: int, seq_len: int | None = None) -> Iterator[Batch]:
        """About `max_tokens` of sequences that no training draws, the same for every seed."""
        length = seq_len or self.stream.seq_len
        self._check(length)
        each = max(1, self.stream.batch_tokens // length)
        total = max(1, max_tokens // length)
        for number, first in enumerate(range(0, total, each)):
            random = _generator(0, _VALIDATION, number)
            yield self._draw(random, min(each, total - first), length, Cursor())

    def batch(self, number: int) -> Batch:
        """Batch `number` of the training stream, from 0."""
        size, length = self.stream.batch_tokens, self.stream.seq_len
        after = Cursor(batches=number + 1, corpus=self.key, shape=size)
        random = _generator(self.stream.seed, _TRAINING, number)
        return self._draw(random, size // length, length, after, self.recall.fewest)

    @property
    def key(self) -> int:
        """A digest, above 0, of what the stream depends on besides the number of the batch."""
        settings = repr((self.recall, self.stream.seq_len, self.stream.seed)).encode()
        return int.from_bytes(hashlib.blake2b(settings, digest_size=7).digest()) + 1

    def recall_probe(
        self, random: np.random.Generator, count: int, length: int, pairs: int, queries: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """As training has them, with another length and number of pairs."""
        if pairs > self.recall.keys or length < shortest(pairs, queries):
            return None
        return sequences(random, count, length, pairs, queries, *self._words, Numbers.bos_id)

    def needle_probe(
        self, random: np.random.Generator, count: int, length: int, depth: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """As many pairs as training has, blanks, and at the end the key of the one at `depth`."""
        pairs = self.recall.pairs
        if length < shortest(pairs, 1):
            return None
        tokens, _ = sequences(random, count, length, pairs, 1, *self._words, Numbers.bos_id)
        tokens[:, 1 + 2 * pairs :] = Numbers.bos_id
        labels = np.full_like(tokens, IGNORED)
        asked = 1 + 2 * round(depth * (pairs - 1))
        tokens[:, -1], labels[:, -1] = tokens[:, asked], tokens[:, asked + 1]
        return tokens, labels

    def bar(self, max_tokens: int) -> tuple[str, str, float]:
        """What guessing gets: the metric, who, and how much."""
        return "val_accuracy", "guessing", 1 / self.recall.values

    def report(self) -> tuple[str, None]:
        """The task in words, and how its first sequence begins."""
        task, length = self.recall, self.stream.seq_len
        begin = self.tokenizer.decode(self.batch(0).tokens[: 1 + 2 * task.pairs].tolist())
        return (
            f"associative recall: {task.pairs} pairs of {task.keys} keys and {task.values} "
            f"values, {task.queries} queries, in sequences of {length} tokens\n"
            f"the first one's pairs: {begin}",
            None,
        )

    @property
    def _words(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the keys, and those of the values."""
        keys, values = self.recall.keys, self.recall.values
        return np.arange(1, 1 + keys), np.arange(1 + keys, 1 + keys + values)

    def _draw(
        self,
        random: np.random.Generator,
        count: int,
        length: int,
        cursor: Cursor,
        fewest: int | None = None,
    ) -> Batch:
        task = self.recall
        tokens, labels = sequences(
            random,
            count,
            length,
            task.pairs,
            task.queries,
            *self._words,
            Numbers.bos_id,
            task.power,
            fewest,
        )
        edges = np.arange(0, (count + 1) * length, length)
        return Batch(tokens.reshape(-1), labels.reshape(-1), edges, cursor)

    def _check(self, length: int) -> None:
        needed = shortest(self.recall.pairs, self.recall.queries)
        if length < needed:
            raise ConfigError(
                f"train.seq_len is {length}; {self.recall.pairs} pairs and {self.recall.queries} "
                f"queries (data.recall.*) need at least {needed}"
            )


class RecallBatches:
    """An endless iterator of the task's batches; one is made in well under a millisecond."""

    def __init__(self, task: Recall, start: Cursor) -> None:
        if start.corpus not in (0, task.key) or start.shape not in (0, task.stream.batch_tokens):
            raise ConfigError(
                f"the cursor at batch {start.batches} belongs to another stream: restore "
                "data.recall.*, train.seq_len, train.batch_tokens and train.seed, or start afresh"
            )
        self.task, self.cursor = task, start

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.peek()
        self.cursor = batch.cursor
        return batch

    def peek(self) -> Batch:
        """The next batch, left where it is."""
        return self.task.batch(self.cursor.batches)

    def close(self) -> None:
        """Nothing is held."""


def _generator(seed: int, part: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(part, number)))
