"""Which files a path, a folder or a pattern names."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data import settings
from data.settings import ConfigError

Named = tuple[tuple[str, Path], ...]
_SIGNS = re.compile(r"[*?[]")
# What would break a line, or cannot be written as UTF-8: names go into messages and logs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def matches(pattern: str) -> Named:
    """The files that `pattern` names, each with its name in the corpus, in a fixed order.

    A path that exists is that path, whatever brackets it holds. `**` follows links to folders,
    but not back to a folder that it came through. What is no file (a folder, a pipe) is passed
    over.

    Raises:
        ConfigError: there is none.
    """
    base = Path(pattern)
    if base.is_dir():
        inside = [path for path in base.rglob("*") if path.is_file()]
        named = [(path.relative_to(base).as_posix(), path) for path in inside]
    elif os.path.lexists(base):
        if not base.is_file():
            raise ConfigError(
                f"data.source is {printable(pattern)}; that is neither a file nor a folder"
            )
        named = [(base.name, base)]
    else:
        found = _glob(Path(base.anchor), base.parts[bool(base.anchor) :], ())
        # By where they lie under the pattern: a corpus is the same wherever its text is.
        folder, _ = split(pattern)
        named = [(path.relative_to(folder).as_posix(), path) for path in found if path.is_file()]
    if not named:
        raise ConfigError(f"data.source is {printable(pattern)}; no file matches it")
    return tuple(sorted((printable(name), path) for name, path in dict.fromkeys(named)))


def absolute(pattern: str) -> str:
    """`pattern` from the root, so that it names the same files in every working directory."""
    if os.path.lexists(pattern) or not is_pattern(pattern):
        return settings.absolute(pattern)
    folder, rest = split(pattern)
    return str(Path(glob.escape(settings.absolute(folder)), rest))


def split(pattern: str) -> tuple[str, str]:
    """The folder before a pattern's first special part, as it is on disk, and the rest."""
    parts = Path(pattern).parts
    folder = []
    for part in parts:
        literal = re.sub(r"\[([*?[])\]", r"\1", part)
        if part != glob.escape(literal) and is_pattern(part):
            break
        folder.append(literal)
    return str(Path(*folder)), str(Path(*parts[len(folder) :]))


def is_pattern(text: str) -> bool:
    return bool(_SIGNS.search(text))


def stdlib() -> Named:
    """The sources of Python's standard library."""
    base = Path(sysconfig.get_path("stdlib"))
    found = [path for path in base.rglob("*.py") if "site-packages" not in path.parts]
    return tuple(sorted((path.relative_to(base).as_posix(), path) for path in found))


def printable(name: str) -> str:
    """`name` on one line and in UTF-8: other characters are spelled as Python does."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], name)


def _glob(
    folder: Path, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]
) -> Iterator[Path]:
    """What the pattern of these parts matches in `folder`; as for `glob`, a dot hides a name.

    Args:
        above: the folders (device, inode) that `**` has come through.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**" and not rest:
        rest = ("*",)
    if not is_pattern(part):
        if os.path.lexists(folder / part):
            yield from _glob(folder / part, rest, ())
        return
    if part == "**":
        try:
            status = folder.stat()
        except OSError:
            return
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        yield from _glob(folder, rest, ())
        for name in _names(folder):
            if not name.startswith(".") and (folder / name).is_dir():
                yield from _glob(folder / name, parts, (*above, here))
        return
    for name in _names(folder):
        hidden = name.startswith(".") and not part.startswith(".")
        if not hidden and fnmatch.fnmatchcase(name, part):
            yield from _glob(folder / name, rest, ())


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # no folder, or one that may not be read
        return []
