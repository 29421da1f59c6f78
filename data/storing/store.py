"""Writing a corpus so that it can be interrupted at any moment.

Tokens, lengths and content hashes are appended to files in a folder of their own. Every
few seconds they are flushed to the disk, and a journal is replaced in one rename that says
how many of their bytes count, what those digest to, and which document comes next. Whoever
goes on verifies these bytes, cuts the files back to them and appends, so the bytes in the
end are the same. Digests are made of what is written, never of what a disk gives back.
Nothing here holds more than one piece of the corpus in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data import regular
from data.settings import ConfigError

SHARD_TOKENS = 1 << 28
JOURNAL = "journal.json"
_COMMIT_SECONDS = 2.0
# A link is not followed: what is cut back to what counts must be the corpus's own.
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
_NAMED_PROBLEMS = 50
_CHUNK = 1 << 20  # documents looked at at once
_EXACT = 1 << 16  # lengths below this are sorted exactly, longer ones to a 64th of an octave


@dataclass
class Journal:
    """What is safely on the disk. Lists are by source, digests by file."""

    shards: list[int] = field(default_factory=lambda: [0])  # tokens in each
    next: list[int] = field(default_factory=list)  # documents read, broken ones too
    documents: list[int] = field(default_factory=list)  # documents stored
    text_bytes: int = 0
    problems: list[dict[str, int]] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    firsts: list[dict[str, str]] = field(default_factory=list)  # of each problem the first one
    digests: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the journal with a digest of its own."""
        content = asdict(self)
        sealed = {"digest": _sealed(content), "journal": content}
        regular.replace(path, json.dumps(sealed).encode())

    @classmethod
    def load(cls, path: Path) -> Journal:
        """What `save` wrote.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            saved = json.loads(regular.content(path))
            if saved["digest"] != _sealed(saved["journal"]):
                raise ValueError("its digest is another")
            return cls(**saved["journal"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"{path} is damaged, or of another version ({error}); delete {path.parent} and "
                "start again"
            ) from None


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

    Raises:
        ConfigError: what was committed is not there as it was written.
    """

    def __init__(self, folder: Path, sources: int, dtype: np.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.journal = Journal(
            next=[0] * sources,
            documents=[0] * sources,
            problems=[{} for _ in range(sources)],
            firsts=[{} for _ in range(sources)],
        )
        if (folder / JOURNAL).exists():
            self.journal = Journal.load(folder / JOURNAL)
        for number in range(len(self.journal.shards) - 1):
            self._open_shard(number).close()
        stored = sum(self.journal.documents)
        self._lengths = self._open("lengths.part", 8 * stored)
        self._hashes = self._open("hashes.part", 8 * stored)
        self._tokens = self._open_shard(len(self.journal.shards) - 1)
        self._committed = time.monotonic()

    def append(self, piece: Piece) -> None:
        """Add a piece; now and then, make all so far safe."""
        journal = self.journal
        if journal.shards[-1] and journal.shards[-1] + len(piece.tokens) > SHARD_TOKENS:
            self.commit()
            self._tokens.close()
            journal.shards.append(0)
            self._tokens = self._open_shard(len(journal.shards) - 1)
        self._tokens.write(piece.tokens.data)
        self._lengths.write(piece.lengths.data)
        self._hashes.write(piece.hashes.data)
        journal.shards[-1] += len(piece.tokens)
        journal.next[piece.source] += piece.read
        journal.documents[piece.source] += len(piece.lengths)
        journal.text_bytes += piece.text_bytes
        for name, problem in piece.problems:
            count_problem(journal.problems[piece.source], problem)
            kind = problem.split(" (")[0]
            journal.firsts[piece.source].setdefault(kind, f"{name}: {problem}")
            if len(journal.named) < _NAMED_PROBLEMS:
                journal.named.append(f"{name}: {problem}")
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flush the files to the disk, then the journal that counts on them."""
        for file in (self._tokens, self._lengths, self._hashes):
            file.flush()
            self.journal.digests[file.name] = file.digest
        self.journal.save(self.folder / JOURNAL)
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the files; what was not committed does not count."""
        for file in (self._tokens, self._lengths, self._hashes):
            file.close()

    def _open_shard(self, number: int) -> _Appended:
        size = self.journal.shards[number] * self.dtype.itemsize
        return self._open(shard_name(number), size)

    def _open(self, name: str, size: int) -> _Appended:
        return _Appended(self.folder / name, size, self.journal.digests.get(name))


class _Appended:
    """A file that is appended to, and the digest of all that was ever written to it.

    Args:
        size: bytes that count; the file is cut back to them.
        expected: their digest, None if there are none.
    """

    def __init__(self, path: Path, size: int, expected: str | None) -> None:
        self.name = path.name
        self._hash = _hash()
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link, which is not followed; delete {path.parent} and start again"
            )
        self._file = open(regular.opened(path, _APPEND), "a+b")  # noqa: SIM115  the writer closes it
        if self._file.tell() < size:
            raise ConfigError(
                f"{path} has {self._file.tell()} bytes where its journal counts on {size}; "
                f"delete {path.parent} and start again"
            )
        self._file.truncate(size)
        self._file.seek(0)
        while block := self._file.read(1 << 20):
            self._hash.update(block)
        if size and self.digest != expected:
            raise ConfigError(
                f"{path} is not what was written (digest {self.digest}, its journal says "
                f"{expected}); delete {path.parent} and start again"
            )

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())

    def write(self, content: memoryview) -> None:
        self._hash.update(content)
        self._file.write(content)

    def flush(self) -> None:
        """To the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def count_problem(kinds: dict[str, int], problem: str) -> None:
    """Count a document that cannot be used; what is in parentheses is of this one alone."""
    kind = problem.split(" (", maxsplit=1)[0]
    kinds[kind] = kinds.get(kind, 0) + 1


def shard_name(number: int) -> str:
    """The file of one shard."""
    return f"tokens-{number:05d}.bin"


def digest(path: Path) -> str:
    """Hexadecimal BLAKE2 digest of a file."""
    made = _hash()
    with open(regular.opened(path), "rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return str(made.hexdigest())


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def digest_of(content: bytes) -> str:
    """As `digest`, of what a file is to hold."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sealed(content: Any) -> str:
    """The digest of JSON values."""
    return digest_of(json.dumps(content).encode())


def reserve(file: IO[bytes], size: int) -> None:
    """Make a file `size` bytes long that lie on the disk: a map of others is a SIGBUS when full.

    Raises:
        OSError: there is no room.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
        file.flush()


def index(
    folder: Path, documents: list[int], validation: float
) -> tuple[list[dict[str, int]], dict[str, str]]:
    """Write offsets.bin, by_length.bin and validation.bin from the lengths and hashes.

    Args:
        folder: holds lengths.part and hashes.part.
        documents: of each source, in the order they are stored.
        validation: the share held out: the documents whose content hash is below it.

    Returns:
        For each source its training documents and their tokens; the digests of the files.

    Raises:
        OSError: the disk is full.
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
    digests = {}
    with _written(folder / "offsets.bin") as out:
        out.write(np.zeros(1, dtype=np.int64).data)
        for first in range(0, total, _CHUNK):
            ends = np.cumsum(lengths[first : first + _CHUNK]) + offset
            out.write(ends.data)
            offset = int(ends[-1])
            held_out.append(first + np.flatnonzero(hashes[first : first + _CHUNK] < threshold))
        digests[out.name] = out.digest
    held = np.concatenate(held_out)
    with _written(folder / "validation.bin") as out:
        out.write(held[np.argsort(hashes[held], kind="stable")].astype(np.int64).data)
        digests[out.name] = out.digest
    (folder / "by_length.bin").unlink(missing_ok=True)  # it may be a link
    with open(folder / "by_length.bin", "xb") as ranked:
        if len(held) < total:
            reserve(ranked, 8 * (total - len(held)))
    found = []
    first, place = 0, 0
    for count in documents:
        made = _rank(folder, lengths, hashes, threshold, range(first, first + count), place)
        found.append(made)
        first, place = first + count, place + made["documents"]
    # Written in no order, through a map: this one is digested when it is done.
    digests["by_length.bin"] = digest(folder / "by_length.bin")
    return found, digests


@contextmanager
def _written(path: Path) -> Iterator[_Appended]:
    """A new file to append to; when all is written it is on the disk."""
    path.unlink(missing_ok=True)
    out = _Appended(path, 0, None)
    try:
        yield out
        out.flush()
    finally:
        out.close()


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
