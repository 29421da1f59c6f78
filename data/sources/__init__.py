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

Weights are counted in tokens; without any, a source weighs what it holds.

Parquet and hub sources are read by `datasets`. Text and JSONL files are read here byte by
byte: `datasets` turns CR LF into LF, so code would not come back as it was, and it gives
a JSONL file up at its first bad line.
"""

from __future__ import annotations

import glob
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import settings
from data.settings import ConfigError
from data.sources import files, hub
from data.sources.document import Document
from data.sources.packed import digest

__all__ = ["Document", "Source", "resolve"]

_READ_WHOLE = 1 << 30  # bytes of a source up to which every byte is in its digest
_KEYS = ("name", "path", "hub", "weight", "text_field", "config", "split", "revision", "streaming")


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
        files = [[name, digest(path, total <= _READ_WHOLE)] for name, path in self.files]
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
        ConfigError: if a file, a key or a glob's match is missing.
    """
    entries = source if isinstance(source, list) else [source]
    if not entries:
        raise ConfigError("data.source is an empty list; name at least one source")
    found: list[Source] = []
    for entry in entries:
        fields = dict(entry) if isinstance(entry, dict) else _guess(str(entry))
        for key in fields:
            if key not in _KEYS:
                raise ConfigError(
                    f"data.source: {key}: no such key; the keys are {', '.join(_KEYS)}"
                )
        made = _source({"text_field": text_field, **fields})
        same = sum(made.name == other.name or made.name == other.name[:-2] for other in found)
        found.append(replace(made, name=f"{made.name}-{same + 1}") if same else made)
    weighted = [made.name for made in found if made.weight is not None]
    if weighted and len(weighted) < len(found):
        raise ConfigError(
            f"data.source: {', '.join(weighted)} have a weight and the others none; "
            "give every source a weight, or none"
        )
    return found


def absolute(source: Any) -> Any:
    """`data.source` with every path from the root, for a file that is read anywhere.

    A source keeps its name, by which it is shuffled: where the longer path would give it another,
    the name is written beside it.
    """
    if isinstance(source, list):
        return [absolute(entry) for entry in source]
    fields = source if isinstance(source, dict) else _guess(str(source))
    path = fields.get("path")
    if not isinstance(path, str) or path in ("stdlib", ""):
        return source
    if Path(path).exists() or not glob.has_magic(path):
        whole = settings.absolute(path)
    else:
        fixed, pattern = _split(path)
        whole = str(Path(glob.escape(settings.absolute(fixed)), pattern))
    named = {} if "name" in fields or _name(whole) == _name(path) else {"name": _name(path)}
    if isinstance(source, dict):
        return {**source, "path": whole, **named}
    return {"path": whole, **named} if named else whole


def _guess(text: str) -> dict[str, Any]:
    """A bare string is a path if there is such a file or it looks like one, else a hub name."""
    looks = any(sign in text for sign in "*?[") or Path(text).suffix or text.startswith((".", "/"))
    return {"path": text} if text == "stdlib" or looks or Path(text).exists() else {"hub": text}


def _source(fields: dict[str, Any]) -> Source:
    path, hub = fields.pop("path", None), fields.pop("hub", None)
    if (path is None) == (hub is None):
        raise ConfigError(f"data.source: {fields} must have one of path and hub")
    weight = fields.get("weight")
    if weight is not None and not (isinstance(weight, (int, float)) and weight >= 0):
        raise ConfigError(f"data.source: weight is {weight!r}; it must be a number, 0 or more")
    if hub is not None:
        name = fields.pop("name", None) or str(hub).replace("/", "-")
        return Source(name, (), hub=str(hub), **fields)
    if path == "stdlib":
        return Source(fields.pop("name", None) or "stdlib", _stdlib(), **fields)
    return Source(fields.pop("name", None) or _name(str(path)), _matches(str(path)), **fields)


def _name(path: str) -> str:
    """What a source is called by its path, unless it is given a name."""
    plain = path.rstrip("/").split("*")[0].rstrip("/")
    return Path(plain).name.split(".")[0] or "files"


def _stdlib() -> tuple[tuple[str, Path], ...]:
    base = Path(sysconfig.get_path("stdlib"))
    found = [path for path in base.rglob("*.py") if "site-packages" not in path.parts]
    return tuple(sorted((path.relative_to(base).as_posix(), path) for path in found))


def _matches(pattern: str) -> tuple[tuple[str, Path], ...]:
    base = Path(pattern)
    if base.is_file():
        return ((base.name, base),)
    if base.is_dir():
        paths = [path for path in base.rglob("*") if path.is_file()]
        return _named(pattern, [(path.relative_to(base).as_posix(), path) for path in paths])
    fixed, _ = _split(pattern)
    paths = [Path(found) for found in glob.glob(pattern, recursive=True)]
    # By where they lie under the pattern: a corpus is the same wherever its text is.
    named = [(path.relative_to(fixed).as_posix(), path) for path in paths if path.is_file()]
    return _named(pattern, named)


def _split(pattern: str) -> tuple[str, str]:
    """The folder before a pattern's first special part, as it is on disk, and the rest."""
    parts = Path(pattern).parts
    folder = []
    for part in parts:
        literal = re.sub(r"\[([*?[])\]", r"\1", part)
        if part not in (literal, glob.escape(literal)) or (
            part == literal and glob.has_magic(part)
        ):
            break
        folder.append(literal)
    return str(Path(*folder)), str(Path(*parts[len(folder) :]))


def _named(pattern: str, named: list[tuple[str, Path]]) -> tuple[tuple[str, Path], ...]:
    if not named:
        raise ConfigError(f"data.source is {pattern}; no file matches it")
    return tuple(sorted(named))
