"""Files that may be compressed, and what they are known by."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import IO

PACKED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"  # a byte order mark in UTF-8
BROKEN = (OSError, EOFError, ValueError, zlib.error)  # what reading may raise
_OTHERS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_SAMPLE = 1 << 16  # bytes at both ends of a large file that are in its digest


class EncodingError(ValueError):
    """A text file whose byte order mark is not that of UTF-8."""


def opened(path: Path) -> IO[bytes]:
    """The content of a file, unpacked."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return open(path, "rb")


def opened_text(path: Path) -> IO[bytes]:
    """The content of a text file, unpacked, from behind its byte order mark on.

    Raises:
        EncodingError: it begins with a mark of UTF-16 or UTF-32.
    """
    stream = opened(path)
    head = stream.read(4)
    for mark, name in _OTHERS.items():
        if head.startswith(mark):
            stream.close()
            raise EncodingError(f"not UTF-8 ({name}; convert it: iconv -f {name} -t UTF-8)")
    return io.BufferedReader(_Joined(head.removeprefix(BOM), stream), 1 << 20)


def has_mark(path: Path) -> bool:
    """Whether a file, unpacked, begins with UTF-8's byte order mark."""
    try:
        with opened(path) as stream:
            return stream.read(len(BOM)) == BOM
    except BROKEN:
        return False


class _Joined(io.RawIOBase):
    """What was read of a stream already, then its rest."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        found = self._head or self._stream.read(len(buffer))
        self._head = b""
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


def digest(path: Path, whole: bool) -> str:
    """Of the content; for large sources of the size, the time of change, both ends."""
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if whole:
            while block := file.read(1 << 20):
                found.update(block)
            return found.hexdigest()
        status = path.stat()
        found.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        found.update(file.read(_SAMPLE))
        file.seek(max(0, status.st_size - _SAMPLE))
        found.update(file.read(_SAMPLE))
    return found.hexdigest()
