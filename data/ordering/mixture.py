"""Which documents a window holds: decks, their weights, and the stages of a curriculum.

A deck is the part of one source that is shuffled by itself: all its documents or, where
`data.long_tokens` splits them, its short or its long ones. A window takes from every
deck its exact share of tokens, in the deck's own order, and leaves off inside a document
if need be. So the mixture is exact in every window, and where a deck stands is two
integers: the position in its endless order and the tokens taken of the document there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.config import DataConfig, StreamConfig
from data.ordering.order import ranks
from data.settings import ConfigError
from data.storing.corpus import Corpus

_WHOLE = 1 << 40  # weights are integers out of this: shares must not depend on rounding


@dataclass(frozen=True)
class Deck:
    """Documents by_length[first:last] of a corpus, shuffled by themselves."""

    source: str
    long: bool
    first: int
    last: int
    tokens: int
    key: int


@dataclass(frozen=True)
class Stage:
    """What holds from optimiser step `step` on: seq_len, every deck's weight out of their sum."""

    step: int
    seq_len: int
    weights: tuple[int, ...]

    def quotas(self, done: int, tokens: int) -> list[int]:
        """Tokens of each deck in the next `tokens`, after `done` of them; they sum to `tokens`."""
        total = sum(self.weights)
        quotas = [(done + tokens) * w // total - done * w // total for w in self.weights]
        largest = max(range(len(quotas)), key=lambda i: self.weights[i])
        quotas[largest] += tokens - sum(quotas)
        return quotas


@dataclass(frozen=True)
class Spans:
    """Runs of stored tokens: where each starts and how long it is, int64 (documents,)."""

    start: np.ndarray
    length: np.ndarray


def decks(corpus: Corpus, data: DataConfig, seed: int) -> list[Deck]:
    """The decks of a corpus; those without training documents are left out."""
    found = []
    for source in corpus.sources:
        middle = source.last
        if data.long_tokens:
            middle = corpus.first_of_length(source.first, source.last, data.long_tokens)
        for long, first, last in ((False, source.first, middle), (True, middle, source.last)):
            if first < last:
                text = f"{corpus.fingerprint} {seed} {source.name} {long}"
                key = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)
                tokens = corpus.tokens_by_length(first, last)
                found.append(Deck(source.name, long, first, last, tokens, key))
    if not found:
        raise ConfigError(f"{corpus.path} has no training documents; give it more text")
    return found


def stages(
    corpus: Corpus, cards: list[Deck], data: DataConfig, stream: StreamConfig
) -> list[Stage]:
    """The stages in the order of their steps; the first begins at step 0.

    Raises:
        ConfigError: if a stage has an unknown key, source, or impossible value.
    """
    weights = data.weights()
    names = [source.name for source in corpus.sources]
    data.check_names(names)
    settings: dict[str, Any] = {
        "seq_len": stream.seq_len,
        "weights": dict(zip(names, weights, strict=True)) if weights else None,
        "long_weight": data.long_weight,
    }
    steps: list[dict[str, Any]] = [{"step": 0}, *sorted(data.stages, key=lambda s: s["step"])]
    found: list[Stage] = []
    for step in steps:
        settings = settings | step
        if settings["seq_len"] > stream.batch_tokens:
            raise ConfigError(
                f"data.stages: seq_len is {settings['seq_len']} from step {step['step']} on, more "
                f"than train.batch_tokens = {stream.batch_tokens}; raise that or lower seq_len"
            )
        shares = _weights(cards, settings["weights"], settings["long_weight"])
        if found and found[-1].step == step["step"]:
            found.pop()
        found.append(Stage(step["step"], settings["seq_len"], shares))
    return found


def take(
    corpus: Corpus, deck: Deck, position: int, offset: int, tokens: int
) -> tuple[Spans, int, int]:
    """The next `tokens` tokens of a deck, and the position and offset after them."""
    count = deck.last - deck.first
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    missing = tokens
    while missing > 0:
        block = min(1 << 18, missing * count // max(deck.tokens, 1) + 64)
        at = ranks(np.arange(position, position + block), count, deck.key)
        ids = corpus.by_length[deck.first + at]
        start, end = corpus.offsets[ids], corpus.offsets[ids + 1]
        start[0] += offset
        length = end - start
        ends = np.cumsum(length)
        taken = int(np.searchsorted(ends, missing, side="left")) + 1
        starts.append(start[:taken])
        lengths.append(length[:taken])
        if taken > block:
            missing -= int(ends[-1])
            position, offset = position + block, 0
            continue
        over = int(ends[taken - 1]) - missing
        length[taken - 1] -= over
        position += taken if over == 0 else taken - 1
        offset = 0 if over == 0 else int(end[taken - 1] - over - corpus.offsets[ids[taken - 1]])
        missing = 0
    empty = np.empty(0, dtype=np.int64)
    return (
        Spans(np.concatenate([empty, *starts]), np.concatenate([empty, *lengths])),
        position,
        offset,
    )


def _weights(
    cards: list[Deck], sources: dict[str, float] | None, long_weight: float
) -> tuple[int, ...]:
    """Integer weights: a source's weight (its tokens, unless given), shared among its decks."""
    names = list(dict.fromkeys(deck.source for deck in cards))
    boosted = [deck.tokens * (long_weight if deck.long else 1.0) for deck in cards]
    if sources is None:
        shares = boosted
    else:
        of_source = {
            name: sum(b for b, deck in zip(boosted, cards, strict=True) if deck.source == name)
            for name in names
        }
        shares = [
            sources.get(deck.source, 0.0) * b / max(of_source[deck.source], 1e-9)
            for deck, b in zip(cards, boosted, strict=True)
        ]
    total = sum(shares)
    if total <= 0:
        raise ConfigError("data: all weights are 0; give at least one source a weight above 0")
    return tuple(round(share / total * _WHOLE) for share in shares)
