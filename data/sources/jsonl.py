"""JSONL files: each line is one document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from data.sources.document import Document, of_row
from data.sources.packed import BOM


def read(name: str, stream: IO[bytes], text_field: str) -> Iterator[Document]:
    """A JSON object a line; blank lines are nothing. Files may be joined, marks and all."""
    began = False
    for number, written in enumerate(stream, 1):
        line = written.removeprefix(BOM).strip()
        if not line:
            continue
        if not began and (problem := _no_lines(line)):
            yield Document(name, None, problem)
            return
        began = True
        where = f"{name}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Document(where, None, "not UTF-8")
        except (ValueError, RecursionError):
            yield Document(where, None, "not JSON")
        else:
            yield of_row(where, row, text_field)


def _no_lines(first: bytes) -> str:
    """What a file is, going by its first line, that is one JSON value instead of many."""
    if first.startswith(b"["):
        return "a JSON array (JSONL is wanted, one object a line)"
    if first == b"{":
        return "a JSON object over several lines (JSONL is wanted, one object a line)"
    return ""
