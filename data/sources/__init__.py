"""Sources: where documents come from, and reading them one by one.

`data.source` names one source or lists several:

    source: stdlib                              the standard library's own sources
    source: texts/**/*.txt                      a file, folder or glob; each file one document
    source: pages.jsonl.zst                     each line one document, its field data.text_field
    source: owner/name                          a data set of the hub
    source:
      - {path: code/**/*.py, weight: 3}
      - {path: web/*.parquet, text_field: content, weight: 1}
      - {hub: owner/name, config: en, split: train, streaming: true, weight: 0.5}

Weights are counted in tokens; without any, a source weighs what it holds. A source's name is
the one given, or that of its file, folder or data set; of several `pages` the second is
`pages-2`. Weights, shuffles and reports go by it.

Parquet and hub sources are read by `datasets`. Text and JSONL files are read here byte by
byte: `datasets` turns CR LF into LF, so code would not come back as it was, and it gives
a JSONL file up at its first bad line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.settings import ConfigError, dump
from data.sources import files, hub, paths
from data.sources.document import NO_TEXT, Document
from data.sources.packed import digest, has_mark
from data.sources.weight import weight

__all__ = ["NO_TEXT", "Document", "Source", "resolve"]

_READ_WHOLE = 1 << 30  # bytes of a source up to which every byte is in its digest
_TEXT = ("name", "path", "hub", "text_field", "config", "split", "revision")
_KEYS = (*_TEXT, "weight", "streaming")


@dataclass(frozen=True)
class Source:
    """One entry of `data.source`. `files` are (name in the corpus, path); a hub source has none."""

    name: str
    files: tuple[tuple[str, Path], ...]
    text_field: str
    weight: float | None = None
    hub: str = ""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True

    def recipe(self) -> list[Any]:
        """What the documents depend on, digests of the files among it, as JSON values."""
        total = sum(path.stat().st_size for _, path in self.files)
        # Corpora made when a mark was text, or cost a record, are others.
        files = [
            [name, digest(path, total <= _READ_WHOLE), *(["BOM"] if has_mark(path) else [])]
            for name, path in self.files
        ]
        hub = [self.hub, self.config, self.split, self.revision] if self.hub else []
        return [self.name, self.text_field, hub, files]

    def documents(self, first: int = 0) -> Iterator[Document]:
        """Every document in a fixed order, those that cannot be used too, from `first` on."""
        if self.hub:
            yield from hub.read(
                self.hub,
                self.config,
                self.split,
                self.revision,
                self.streaming,
                self.text_field,
                first,
            )
            return
        for name, path in self.files:
            for document in files.read(name, path, self.text_field):
                if first:
                    first -= 1
                else:
                    yield document


def resolve(source: str | list[Any] | dict[str, Any], text_field: str) -> list[Source]:
    """The sources that `data.source` names; their names are different.

    Raises:
        ConfigError: if a file, a key or a glob's match is missing, a value is impossible, or two
            sources are given one name.
    """
    entries = source if isinstance(source, list) else [source]
    if not entries:
        raise ConfigError("data.source is an empty list; name at least one source")
    listed = [_fields(entry) for entry in entries]
    names = _names(listed)
    found = [
        _source({"text_field": text_field, **fields, "name": name})
        for fields, name in zip(listed, names, strict=True)
    ]
    weighted = [made.name for made in found if made.weight is not None]
    if weighted and len(weighted) < len(found):
        raise ConfigError(
            f"data.source: {', '.join(weighted)} have a weight and the others none; "
            "give every source a weight, or none"
        )
    if weighted and not any(made.weight for made in found):
        raise ConfigError(
            "data.source: all weights are 0; give at least one source a weight above 0"
        )
    return found


def absolute(source: Any) -> Any:
    """`data.source` with every path from the root, for a file that is read anywhere.

    A source keeps its name, by which it is shuffled: where the longer paths would give the sources
    other names, these are written beside them.
    """
    entries = source if isinstance(source, list) else [source]
    before = [_fields(entry) for entry in entries]
    after = [
        {**fields, "path": paths.absolute(fields["path"])}
        if fields.get("path", "stdlib") != "stdlib"
        else fields
        for fields in before
    ]
    names = _names(before)
    if _names(after) != names:
        after = [{**fields, "name": name} for fields, name in zip(after, names, strict=True)]
    written = [
        fields["path"] if isinstance(entry, str) and [*fields] == ["path"] else fields
        for entry, fields in zip(entries, after, strict=True)
    ]
    return written if isinstance(source, list) else written[0]


def _fields(entry: Any) -> dict[str, Any]:
    """The keys of an entry, each with a value of its type."""
    if isinstance(entry, str):
        entry = _guess(entry)
    if not isinstance(entry, dict):
        raise ConfigError(
            f"data.source: {dump(entry)} is no source; it must be text, or a mapping with path "
            "or hub"
        )
    fields = {key: value for key, value in entry.items() if value is not None}
    for key, value in fields.items():
        if key not in _KEYS:
            raise ConfigError(f"data.source: {key}: no such key; the keys are {', '.join(_KEYS)}")
        if key in _TEXT and not (isinstance(value, str) and value):
            raise ConfigError(f"data.source: {key} is {dump(value)}; it must be text")
        if key == "streaming" and not isinstance(value, bool):
            raise ConfigError(f"data.source: {key} is {dump(value)}; it must be true or false")
    if ("path" in fields) == ("hub" in fields):
        raise ConfigError(f"data.source: {dump(entry)} must have one of path and hub")
    if "weight" in fields:
        fields["weight"] = weight(fields["weight"], "data.source: weight")
    if (name := fields.get("name")) and ("/" in name or name != paths.printable(name)):
        raise ConfigError(f"data.source: name is {dump(name)}; it must be a word without /")
    return fields


def _guess(text: str) -> dict[str, Any]:
    """A bare string is a path if there is such a file or it looks like one, else a hub name."""
    looks = paths.is_pattern(text) or Path(text).suffix or text.startswith((".", "/"))
    return {"path": text} if text == "stdlib" or looks or Path(text).exists() else {"hub": text}


def _names(listed: list[dict[str, Any]]) -> list[str]:
    """A name for each source: the one given, or the file's, numbered where that is taken."""
    given = [fields["name"] for fields in listed if "name" in fields]
    for name, count in Counter(given).items():
        if count > 1:
            raise ConfigError(
                f"data.source: {count} sources are named {name}; give each a name of its own"
            )
    taken, seen, names = set(given), Counter[str](), []
    for fields in listed:
        if (name := fields.get("name")) is None:
            base = _base(fields)
            name = base
            while name in taken:
                seen[base] += 1
                name = f"{base}-{seen[base] + 1}"
            taken.add(name)
        names.append(name)
    return names


def _base(fields: dict[str, Any]) -> str:
    """What a source is called after: its data set, or what its path has before any pattern."""
    if "hub" in fields:
        return paths.printable(fields["hub"]).replace("/", "-")
    plain = fields["path"]
    if not Path(plain).exists():
        plain = plain.rstrip("/").split("*")[0]
    return paths.printable(Path(plain.rstrip("/")).name.split(".")[0]) or "files"


def _source(fields: dict[str, Any]) -> Source:
    path = fields.pop("path", None)
    if path is None:
        return Source(files=(), **fields)
    return Source(files=paths.stdlib() if path == "stdlib" else paths.matches(path), **fields)
