"""Tests of a text model's memory, made of its own tokenizer's pieces and held-out text."""

from __future__ import annotations

import numpy as np

from data.batch import IGNORED
from data.storing.held_out import HeldOutDocuments

_HAYSTACK = 1 << 20  # held-out tokens to cut text from
_SENTENCE = 4  # words of a needle before what it tells, and as many that it tells


class TextProbes:
    """Probes for models of a corpus's text.

    Words are pieces of three letters or more. Keys and values are different ones, dealt out
    by turns, so that a value never looks like a key.
    """

    def __init__(self, corpus: HeldOutDocuments) -> None:
        tokenizer = corpus.tokenizer
        long = np.flatnonzero(tokenizer.byte_lengths() >= 3).tolist()
        found = [token for token in long if tokenizer.decode([token]).strip().isalpha()]
        self.keys, self.values = np.array(found[::2]), np.array(found[1::2])
        self.start = tokenizer.bos_id
        starts, lengths = corpus.validation_spans(_HAYSTACK)
        self.text = corpus.gather(starts, lengths) if len(starts) else np.empty(0, dtype=np.int64)

    def recall(
        self, random: np.random.Generator, count: int, length: int, pairs: int, queries: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """[start] k₁ v₁ … kₙ vₙ, text, then k v of `queries` different pairs.

        Returns:
            tokens and labels, int64 (count, length): the label of a key's second showing is
            its value, all others are IGNORED. None if they do not fit, or words are too few.
        """
        first, last = 1 + 2 * pairs, length - 2 * queries
        words = min(len(self.keys), len(self.values))
        if not len(self.text) or first > last or not queries <= pairs <= words:
            return None
        key, value = (
            random.permuted(np.tile(words, (count, 1)), axis=1)[:, :pairs]
            for words in (self.keys, self.values)
        )
        tokens, labels = self._haystacks(random, count, length)
        tokens[:, 1:first:2], tokens[:, 2:first:2] = key, value
        asked = random.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)[:, :queries]
        tokens[:, last::2] = np.take_along_axis(key, asked, 1)
        tokens[:, last + 1 :: 2] = np.take_along_axis(value, asked, 1)
        labels[:, last::2] = tokens[:, last + 1 :: 2]
        return tokens, labels

    def needle(
        self, random: np.random.Generator, count: int, length: int, depth: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Text with four keys and four values at `depth`; the four keys end the sequence.

        Returns:
            As `recall`; what is asked for are the four values, one after the other.
        """
        size, ending = 2 * _SENTENCE, 2 * _SENTENCE - 1
        room = length - 1 - size - ending
        if not len(self.text) or room < 0 or len(self.values) < _SENTENCE:
            return None
        needle = np.concatenate(
            [random.choice(words, (count, _SENTENCE)) for words in (self.keys, self.values)], axis=1
        )
        tokens, labels = self._haystacks(random, count, length)
        at = 1 + round(depth * room)
        tokens[:, at : at + size] = needle
        tokens[:, -ending:] = needle[:, :-1]
        labels[:, -_SENTENCE:] = needle[:, _SENTENCE:]
        return tokens, labels

    def _haystacks(
        self, random: np.random.Generator, count: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Held-out text from random places on, behind the token that starts a document."""
        places = random.integers(0, len(self.text), (count, 1)) + np.arange(length)
        tokens = self.text[places % len(self.text)]
        tokens[:, 0] = self.start
        return tokens, np.full_like(tokens, IGNORED)
