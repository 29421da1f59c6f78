"""Writing a corpus so that it can be interrupted at any moment.

Tokens, lengths and content hashes are appended to files in a folder of their own. Every
few seconds they are flushed to the disk, and a journal is replaced in one rename that says
how many of their bytes count and which document comes next. Whoever goes on cuts the files
back to that and appends, so the bytes in the end are the same. Nothing here holds more than
one piece of the corpus in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.settings import ConfigError

SHARD_TOKENS = 1 << 28
JOURNAL = "journal.json"
_COMMIT_SECONDS = 2.0
_NAMED_PROBLEMS = 50
_CHUNK = 1 << 20  # documents looked at at once
_EXACT = 1 << 16  # lengths below this are sorted exactly, longer ones to a 64th of an octave


@dataclass
class Journal:
    """What is safely on the disk. Lists are by source."""

    shards: list[int] = field(default_factory=lambda: [0])  # tokens in each
    next: list[int] = field(default_factory=list)  # documents read, broken ones too
    documents: list[int] = field(default_factory=list)  # documents stored
    text_bytes: int = 0
    problems: list[dict[str, int]] = field(default_factory=list)
    named: list[str] = field(default_factory=list)


@dataclass
class Piece:
    """Some documents of one source, coded: what a worker gives back."""

    source: int
    read: int
    tokens: np.ndarray  # (total,)
    lengths: np.ndarray  # int64 (documents,)
    hashes: np.ndarray  # uint64 (documents,)
    text_bytes: int
    problems: list[tuple[str, str]]  # name, what is wrong


class Writer:
    """Appends pieces to the files of a corpus in the making.

    Args:
        folder: where they are; what an earlier writer committed is kept.
        sources: how many there are.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, sources: int, dtype: np.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.journal = Journal(
            next=[0] * sources, documents=[0] * sources, problems=[{} for _ in range(sources)]
        )
        if (folder / JOURNAL).exists():
            self.journal = Journal(**json.loads((folder / JOURNAL).read_text()))
        stored = sum(self.journal.documents)
        self._lengths = _reopened(folder / "lengths.part", 8 * stored)
        self._hashes = _reopened(folder / "hashes.part", 8 * stored)
        self._tokens = self._open_shard()
        self._committed = time.monotonic()

    def append(self, piece: Piece) -> None:
        """Add a piece; now and then, make all so far safe."""
        journal = self.journal
        if journal.shards[-1] and journal.shards[-1] + len(piece.tokens) > SHARD_TOKENS:
            self.commit()
            self._tokens.close()
            journal.shards.append(0)
            self._tokens = self._open_shard()
        self._tokens.write(piece.tokens.data)
        self._lengths.write(piece.lengths.data)
        self._hashes.write(piece.hashes.data)
        journal.shards[-1] += len(piece.tokens)
        journal.next[piece.source] += piece.read
        journal.documents[piece.source] += len(piece.lengths)
        journal.text_bytes += piece.text_bytes
        for name, problem in piece.problems:
            kinds = Counter(journal.problems[piece.source])
            kinds[problem.split(" (")[0]] += 1
            journal.problems[piece.source] = dict(kinds)
            if len(journal.named) < _NAMED_PROBLEMS:
                journal.named.append(f"{name}: {problem}")
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flush the files to the disk, then the journal that counts on them."""
        for file in (self._tokens, self._lengths, self._hashes):
            file.flush()
            os.fsync(file.fileno())
        replace(self.folder / JOURNAL, json.dumps(asdict(self.journal)))
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the files; what was not committed does not count."""
        for file in (self._tokens, self._lengths, self._hashes):
            file.close()

    def _open_shard(self) -> Any:
        number = len(self.journal.shards) - 1
        size = self.journal.shards[number] * self.dtype.itemsize
        return _reopened(self.folder / shard_name(number), size)


def shard_name(number: int) -> str:
    """The file of one shard."""
    return f"tokens-{number:05d}.bin"


def replace(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def digest(path: Path) -> str:
    """Hexadecimal BLAKE2 digest of a file."""
    made = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def index(folder: Path, documents: list[int], validation: float) -> list[dict[str, int]]:
    """Write offsets.bin, by_length.bin and validation.bin from the lengths and hashes.

    Args:
        folder: holds lengths.part and hashes.part.
        documents: of each source, in the order they are stored.
        validation: the share held out: the documents whose content hash is below it.

    Returns:
        For each source its training documents and their tokens.
    """
    total = sum(documents)
    lengths = np.memmap(folder / "lengths.part", dtype=np.int64, mode="r", shape=(total,))
    hashes = np.memmap(folder / "hashes.part", dtype=np.uint64, mode="r", shape=(total,))
    threshold = np.uint64(min(int(validation * 2**64), 2**64 - 1))
    if validation and total > 1 and hashes.min() >= threshold:
        threshold = hashes.min() + np.uint64(1)  # at least one document
    if total == 1:
        threshold = np.uint64(0)
    offset = 0
    held_out = []
    with open(folder / "offsets.bin", "wb") as out:
        out.write(np.zeros(1, dtype=np.int64).data)
        for first in range(0, total, _CHUNK):
            ends = np.cumsum(lengths[first : first + _CHUNK]) + offset
            out.write(ends.data)
            offset = int(ends[-1])
            held_out.append(first + np.flatnonzero(hashes[first : first + _CHUNK] < threshold))
    held = np.concatenate(held_out)
    held[np.argsort(hashes[held], kind="stable")].astype(np.int64).tofile(folder / "validation.bin")
    with open(folder / "by_length.bin", "wb") as ranked:
        ranked.truncate(8 * (total - len(held)))
    found = []
    first, place = 0, 0
    for count in documents:
        made = _rank(folder, lengths, hashes, threshold, range(first, first + count), place)
        found.append(made)
        first, place = first + count, place + made["documents"]
    return found


def length_key(lengths: np.ndarray) -> np.ndarray:
    """int64: what `by_length.bin` is sorted by; rises with the length."""
    octaves = np.log2(np.maximum(lengths, _EXACT)) - np.log2(_EXACT)
    return np.minimum(lengths, _EXACT) + np.floor(octaves * 64).astype(np.int64)


def _rank(
    folder: Path,
    lengths: np.ndarray,
    hashes: np.ndarray,
    threshold: np.uint64,
    documents: range,
    place: int,
) -> dict[str, int]:
    """Counting sort of one source's training documents by length, into by_length.bin at `place`."""
    counts = np.zeros(_EXACT + 64 * 48, dtype=np.int64)
    tokens = 0
    chunks = [
        slice(first, min(first + _CHUNK, documents.stop))
        for first in range(documents.start, documents.stop, _CHUNK)
    ]
    for chunk in chunks:
        kept = lengths[chunk][hashes[chunk] >= threshold]
        counts += np.bincount(length_key(kept), minlength=len(counts))
        tokens += int(kept.sum())
    total = int(counts.sum())
    if total:
        starts = place + np.cumsum(counts) - counts
        ranked = np.memmap(folder / "by_length.bin", dtype=np.int64, mode="r+")
        for chunk in chunks:
            ids = chunk.start + np.flatnonzero(hashes[chunk] >= threshold)
            keys = length_key(lengths[ids])
            order = np.argsort(keys, kind="stable")
            ids, keys = ids[order], keys[order]
            ranked[starts[keys] + np.arange(len(keys)) - np.searchsorted(keys, keys)] = ids
            starts += np.bincount(keys, minlength=len(starts))
        ranked.flush()
    return {"documents": total, "tokens": tokens}


def _reopened(path: Path, size: int) -> Any:
    """`path` for appending, cut back to `size` bytes."""
    file = open(path, "ab")  # noqa: SIM115  the writer closes it
    if file.tell() < size:
        raise ConfigError(
            f"{path} has {file.tell()} bytes where its journal counts on {size}; "
            f"delete {path.parent} and start again"
        )
    file.truncate(size)
    return file
