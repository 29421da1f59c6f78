"""JSONL files: each line is one document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from data.sources.document import Document, of_row


def read(name: str, stream: IO[bytes], text_field: str) -> Iterator[Document]:
    """A JSON object a line; blank lines are nothing."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Document(where, None, "not UTF-8")
        except (ValueError, RecursionError):
            yield Document(where, None, "not JSON")
        else:
            yield of_row(where, row, text_field)
