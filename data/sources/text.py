"""Text files: each is one document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from data.sources.document import Document, of_bytes

_BLOCK = 1 << 24  # bytes; a longer text file becomes several documents, which bounds memory


def read(name: str, stream: IO[bytes]) -> Iterator[Document]:
    """A file as one document, or as several if it is longer than _BLOCK."""
    part, rest = 0, b""
    while True:
        content = rest + stream.read(_BLOCK - len(rest))
        last = len(content) < _BLOCK
        line_end = content.rfind(b"\n") + 1
        cut = len(content) if last else line_end or _whole_characters(content)
        rest = content[cut:]
        label = name if part == 0 and last else f"{name}#{part}"
        if content or part == 0:
            yield of_bytes(label, content[:cut])
        part += 1
        if last:
            return


def _whole_characters(content: bytes) -> int:
    """Where the last, maybe incomplete, UTF-8 character begins."""
    start = len(content) - 1
    while start > len(content) - 4 and content[start] & 0xC0 == 0x80:
        start -= 1
    return start
