"""Files of any kind, by their suffix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.settings import ConfigError
from data.sources import jsonl, parquet, text
from data.sources.document import Document
from data.sources.packed import BROKEN, PACKED, EncodingError, opened_text

_LINES = (".jsonl", ".ndjson", ".json")


def read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The documents of one file; one that cannot be read is one broken document."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")
    try:
        if kind == ".parquet":
            yield from parquet.read(name, path, text_field)
            return
        with opened_text(path) as stream:
            yield from (
                jsonl.read(name, stream, text_field) if kind in _LINES else text.read(name, stream)
            )
    except ConfigError:
        raise
    except EncodingError as error:
        yield Document(name, None, str(error))
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Document(name, None, f"unreadable ({reason})")
