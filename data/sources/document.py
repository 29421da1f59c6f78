"""A document: one text, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.sources.paths import printable

NO_TEXT = "no text in field"


@dataclass(frozen=True)
class Document:
    """One text and where it is from; if it cannot be used, text is None and `problem` says why."""

    name: str
    text: str | None
    problem: str = ""


def of_bytes(name: str, content: bytes) -> Document:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return Document(name, None, "not UTF-8")
    return Document(name, text) if text else Document(name, None, "empty")


def of_row(name: str, row: Any, text_field: str) -> Document:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return Document(name, None, f"{NO_TEXT} {text_field}{_instead(row, text_field)}")
    if not text:
        return Document(name, None, "empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return Document(name, None, "not UTF-8")
    return Document(name, text)


def _instead(row: Any, text_field: str) -> str:
    """What a row has where the text is missing: the kind of value there, or its fields."""
    if not isinstance(row, dict) or not row:
        return ""
    if (value := row.get(text_field)) is not None:
        return f" (it is of type {type(value).__name__})"
    names = ", ".join(str(name) for name in row if name != text_field)
    return f" (fields: {printable(names)[:200]})" if names else ""
