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
import gzip
import hashlib
import io
import json
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from data.settings import ConfigError

_BLOCK = 1 << 24  # bytes; a longer text file becomes several documents, which bounds memory
_READ_WHOLE = 1 << 30  # bytes of a source up to which every byte is in its digest
_SAMPLE = 1 << 16  # bytes at both ends of each file that are in it beyond that
_PACKED = (".gz", ".zst")
_LINES = (".jsonl", ".ndjson", ".json")
_KEYS = ("name", "path", "hub", "weight", "text_field", "config", "split", "revision", "streaming")


@dataclass(frozen=True)
class Document:
    """One text and where it is from; if it cannot be used, text is None and `problem` says why."""

    name: str
    text: str | None
    problem: str = ""


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
        files = [[name, _digest(path, total <= _READ_WHOLE)] for name, path in self.files]
        hub = [self.hub, self.config, self.split, self.revision] if self.hub else []
        return [self.name, self.text_field, hub, files]

    def documents(self, first: int = 0) -> Iterator[Document]:
        """Every document in a fixed order, those that cannot be used too, from `first` on."""
        if self.hub:
            yield from _hub(self, first)
            return
        for name, path in self.files:
            for document in _file(name, path, self.text_field):
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
    files = _matches(str(path))
    plain = str(path).rstrip("/").split("*")[0].rstrip("/")
    name = fields.pop("name", None) or Path(plain).name.split(".")[0] or "files"
    return Source(name, files, **fields)


def _stdlib() -> tuple[tuple[str, Path], ...]:
    base = Path(sysconfig.get_path("stdlib"))
    found = [path for path in base.rglob("*.py") if "site-packages" not in path.parts]
    return tuple(sorted((path.relative_to(base).as_posix(), path) for path in found))


def _matches(pattern: str) -> tuple[tuple[str, Path], ...]:
    base = Path(pattern)
    if base.is_dir():
        paths = [path for path in base.rglob("*") if path.is_file()]
        return _named(pattern, [(path.relative_to(base).as_posix(), path) for path in paths])
    paths = [Path(found) for found in glob.glob(pattern, recursive=True)]
    return _named(pattern, [(path.as_posix(), path) for path in paths if path.is_file()])


def _named(pattern: str, named: list[tuple[str, Path]]) -> tuple[tuple[str, Path], ...]:
    if not named:
        raise ConfigError(f"data.source is {pattern}; no file matches it")
    return tuple(sorted(named))


def _digest(path: Path, whole: bool) -> str:
    """Of the content; for large sources of the size, the time of change, both ends."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if whole:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, status.st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _file(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The documents of one file; one that cannot be read is one broken document."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    kind = suffixes[-1].lower() if suffixes else ""
    try:
        if kind == ".parquet":
            yield from _parquet(name, path, text_field)
            return
        with _opened(path) as stream:
            yield from _lines(name, stream, text_field) if kind in _LINES else _text(name, stream)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        yield Document(name, None, f"unreadable ({str(error).splitlines()[0]})")


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return open(path, "rb")


def _text(name: str, stream: IO[bytes]) -> Iterator[Document]:
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
            yield _checked(label, content[:cut])
        part += 1
        if last:
            return


def _whole_characters(content: bytes) -> int:
    """Where the last, maybe incomplete, UTF-8 character begins."""
    start = len(content) - 1
    while start > len(content) - 4 and content[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _checked(name: str, content: bytes) -> Document:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return Document(name, None, "not UTF-8")
    return Document(name, text) if text else Document(name, None, "empty")


def _lines(name: str, stream: IO[bytes], text_field: str) -> Iterator[Document]:
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
            yield _row(where, row, text_field)


def _row(name: str, row: Any, text_field: str) -> Document:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return Document(name, None, f"no text in field {text_field}")
    if not text:
        return Document(name, None, "empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return Document(name, None, "not UTF-8")
    return Document(name, text)


def _parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        if path.suffix in _PACKED:
            plain = Path(folder) / "plain.parquet"
            with _opened(path) as stream, open(plain, "wb") as out:
                while block := stream.read(1 << 20):
                    out.write(block)
            path = plain
        # A path with glob characters of its own must not be read as a pattern.
        rows = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path)), split="train", streaming=True
        )
        columns = rows.column_names
        if columns is not None and text_field not in columns:
            raise ConfigError(
                f"{name} has no column {text_field}; data.text_field must be one of "
                f"{', '.join(columns)}"
            )
        for number, row in enumerate(rows.select_columns([text_field])):
            yield _row(f"{name}:{number}", row, text_field)


def _hub(source: Source, first: int) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.hub,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        columns = rows.column_names
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data.source is {source.hub}; no file, and no data set that can be read ({reason})"
        ) from None
    if columns is not None and source.text_field not in columns:
        raise ConfigError(
            f"{source.hub} has no column {source.text_field}; data.text_field must be one of "
            f"{', '.join(columns)}"
        )
    for number, row in enumerate(rows.skip(first) if first else rows, first):
        yield _row(f"{source.hub}:{number}", row, source.text_field)
