"""The text a tokenizer is trained on: slices from all over the sources, by their weights."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

from data.sources import Source

_SAMPLE = 4 << 20  # characters in all
_READ = 256 << 20  # characters of each source looked at, at most
_SLICE = 4096


def sample(sources: list[Source]) -> Iterator[str]:
    """About 4 Mi characters: of each source its share by weight, or by size without weights.

    Every slice of text has a number, the hash of its place; the slices with the smallest
    numbers are the sample, whatever the order in which sources are read.
    """
    if all(source.weight is None for source in sources):
        yield from _smallest(sources, _SAMPLE)
        return
    total = sum(source.weight or 0.0 for source in sources)
    for source in sources:
        if source.weight:  # however light, some of it
            yield from _smallest([source], max(_SLICE, int(_SAMPLE * source.weight / total)))


def _smallest(sources: list[Source], characters: int) -> list[str]:
    kept: list[tuple[int, str]] = []  # a heap with the largest number on top
    for source in sources:
        for number, text in _slices(source):
            heapq.heappush(kept, (-number, text))
            if len(kept) > characters // _SLICE:
                heapq.heappop(kept)
    return [text for _, text in sorted(kept, reverse=True)]


def _slices(source: Source) -> Iterator[tuple[int, str]]:
    read = 0
    for document in source.documents():
        text = document.text or ""
        for start in range(0, len(text), _SLICE):
            place = f"{source.name} {document.name} {start}".encode()
            number = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")
            yield number, text[start : start + _SLICE]
        read += len(text)
        if read > _READ:
            return
