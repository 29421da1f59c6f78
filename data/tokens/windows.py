"""Long texts in overlapping windows, with the ids that the whole text would have.

BPE's time and memory grow faster than the text, so a tokenizer is given a long one piece by
piece. A text cannot be cut just anywhere: the split of `\\n\\n    ` in two, of a run of digits, or
of a word without an end changes ids around it. No rule of where to cut fits every tokenizer. So
two windows overlap, and the cut lies where both agree: the first window saw what comes before it,
the second what comes after it, and what each of them lacks changed nothing for either. For BPE
that is exact, since ids are those of the whole as soon as all neighbours in pairs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Bytes. SentencePiece's BPE takes a tenth longer for a byte of Python's sources in windows of
# 16 KiB than of 4, twice as long at 64 KiB, four times at 256; overlaps cost more in small ones.
WINDOW = 1 << 14
# Unigram's time grows with the text alone. Its scores are summed in single precision over all
# that it is given, so that ids of the whole text are found only by giving it the whole.
WINDOW_OF_SUMS = 1 << 22
_OVERLAP = 1 << 9
_TRIES = 4

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class _Window:
    """Bytes from `start` to `end` of a text: their ids, and where each id's bytes end."""

    start: int
    end: int
    ids: list[int]
    ends: np.ndarray


def encode_long(text: str, encode: Encode, lengths: np.ndarray, window: int = WINDOW) -> list[int]:
    """What `encode` makes of the whole text, though it is given no more than it must at once.

    Args:
        encode: text to ids.
        lengths: int64 (vocab_size,), bytes that each id stands for.
        window: bytes that it is given at once, unless it needs more to be sure.
    """
    content = text.encode()
    if len(content) <= window:
        return encode(text)

    def coded(start: int, size: int) -> _Window:
        end = min(start + size, len(content))
        while end < len(content) and not _starts_character(content, end):
            end -= 1
        ids = encode(content[start:end].decode())
        return _Window(start, end, ids, start + np.cumsum(lengths[np.array(ids, dtype=np.int64)]))

    found: list[int] = []
    here = coded(0, window)
    while here.end < len(content):
        # Ids that stand for other text than theirs tell no place.
        if not len(here.ends) or here.ends[-1] != here.end:
            return encode(text)
        for count in _cuts(here, content):
            following = coded(int(here.ends[count - 1]), window)
            if _agree(here, following, count):
                found += here.ids[:count]
                here = following
                break
        else:
            here = coded(here.start, 2 * (here.end - here.start))
    return found + here.ids


def _cuts(here: _Window, content: bytes) -> Iterator[int]:
    """How many ids to keep of a window, the most promising first: up to a word's end at best."""
    low, high = np.searchsorted(here.ends, [here.end - 2 * _OVERLAP, here.end - _OVERLAP])
    places = [(int(here.ends[i]), i + 1) for i in reversed(range(low, high))]
    places = [(at, count) for at, count in places if _starts_character(content, at)]
    places.sort(key=lambda place: not _ends_word(content, place[0]))
    yield from (count for _, count in places[:_TRIES])


def _agree(here: _Window, following: _Window, count: int) -> bool:
    """Whether the second window begins with the ids that follow in the first.

    The last of these do not count: they may be what they are since the first window ends.
    """
    sure = int(np.searchsorted(here.ends, here.end - _OVERLAP // 2, side="right"))
    shared = here.ids[count:sure]
    return len(shared) > 0 and shared == following.ids[: len(shared)]


def _starts_character(content: bytes, at: int) -> bool:
    return at == len(content) or content[at] & 0xC0 != 0x80


def _ends_word(content: bytes, at: int) -> bool:
    return content[at : at + 1].isspace() and not content[at - 1 : at].isspace()
