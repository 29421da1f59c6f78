"""Documents: where text comes from."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.settings import ConfigError


@dataclass(frozen=True)
class Document:
    """One text with the place it came from; `text` is None if it is broken, `problem` says how."""

    name: str
    text: str | None
    problem: str = ""


def files(config: DataConfig) -> tuple[str, list[tuple[str, Path]]]:
    """The source's short name and its files, each with the name it has in the corpus."""
    if config.source == "stdlib":
        base = Path(sysconfig.get_path("stdlib"))
        found = [path for path in base.rglob("*.py") if "site-packages" not in path.parts]
        named = sorted((path.relative_to(base).as_posix(), path) for path in found)
        return "stdlib", named
    paths = sorted(glob.glob(str(config.source), recursive=True))
    named = [(path, Path(path)) for path in paths if Path(path).is_file()]
    if not named:
        raise ConfigError(f"data.source is {config.source}; no file matches it")
    return Path(str(config.source)).stem.replace("*", "") or "files", named


def documents(named: list[tuple[str, Path]]) -> Iterator[Document]:
    """Every file as one document, in order."""
    for name, path in named:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            yield Document(name, None, "not UTF-8")
            continue
        if not text:
            yield Document(name, None, "empty")
            continue
        yield Document(name, text)
