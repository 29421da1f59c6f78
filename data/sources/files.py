"""Files of any kind, by their suffix."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from data.settings import ConfigError
from data.sources import jsonl, parquet, text
from data.sources.document import Document
from data.sources.packed import PACKED, opened

_LINES = (".jsonl", ".ndjson", ".json")


def read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The documents of one file; one that cannot be read is one broken document."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    kind = suffixes[-1].lower() if suffixes else ""
    try:
        if kind == ".parquet":
            yield from parquet.read(name, path, text_field)
            return
        with opened(path) as stream:
            yield from (
                jsonl.read(name, stream, text_field) if kind in _LINES else text.read(name, stream)
            )
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        yield Document(name, None, f"unreadable ({str(error).splitlines()[0]})")
