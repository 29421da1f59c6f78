"""Files that may be compressed, and what they are known by."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path
from typing import IO

PACKED = (".gz", ".zst")
_SAMPLE = 1 << 16  # bytes at both ends of a large file that are in its digest


def opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return open(path, "rb")


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
