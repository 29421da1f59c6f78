"""Settings: nested dataclasses, read from YAML files and `key=value` overrides.

Every room keeps the dataclass of its own settings; this module fills them and knows none. Of
each field's metadata, `help` is its line in `--help`; `least`, `most`, `above` and `below` bound
a number, and `path` says that text names a file or folder. All are checked before the dataclass
is made, so that its `__post_init__` has only to say what settings are to each other.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import stat
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data import values as plain
from data.conversion import ConfigError, check, choices, convert, cut, shown
from data.values import dump_line as dump

__all__ = [
    "ConfigError",
    "absolute",
    "build",
    "describe",
    "dump",
    "fields",
    "load",
    "of_long_path",
    "override",
    "setting",
    "with_absolute_paths",
]

COMMAND_LINE = "command line"

Schema = TypeVar("Schema")


_MOST_BASES = 20


def of_long_path(error: OSError) -> ConfigError:
    """What to tell of a path that is longer than a file system takes; raises any other error."""
    if error.errno != errno.ENAMETOOLONG:
        raise error
    return ConfigError(f"{cut(str(error.filename))}: the path is too long for a file system")


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with its default, its line of help, and its limits.

    Args:
        least, most: a number may be these. above, below: it may not.
        path: the value names a file or folder.
    """
    limits = {"least": least, "most": most, "above": above, "below": below}
    metadata: dict[str, Any] = {"help": help, "path": path}
    metadata |= {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str] = (),
    partial: Collection[str] | None = None,
) -> Schema:
    """Fill `schema` from the YAML file `path` and `key=value` overrides, in that order.

    Args:
        schema: a dataclass whose fields are settings or dataclasses of settings.
        path: a YAML mapping. Its key `base` may name another file, relative to it, that is
            read first. Mappings merge down to the settings. A setting is replaced as a whole,
            a mapping too, unless it can be nothing but a mapping: that one merges as well.
        overrides: `section.key=value`, the value in YAML. `section.key.part=value` sets one
            part of a setting that is a mapping.
        partial: for a command that reads only its part of a run's file: the sections of
            which the schema has some keys. Their other keys are passed over, and so are
            sections that it does not have. None: every key must be known.

    Raises:
        ConfigError: naming the file, the key and what would be right.
    """
    values: dict[str, tuple[Any, str]] = {}
    whole = _whole(schema)
    for name, value in _read(Path(path), (), whole):
        _replace(values, name, value, whole)
    override(schema, values, overrides)
    return build(schema, values, str(path), partial)


def override(schema: type, values: dict[str, tuple[Any, str]], overrides: Sequence[str]) -> None:
    """Set in `values`, as `build` takes them, what `key=value` words say.

    Raises:
        ConfigError: a word is not of that form, or its value is no YAML.
    """
    whole = _whole(schema)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{COMMAND_LINE}: {cut(repr(word))} is not of the form key=value")
        for name, leaf in _flatten(_parse(text, f"{COMMAND_LINE}: {key}"), key.strip(), whole):
            _replace(values, name, (leaf, COMMAND_LINE), whole)


def build(
    schema: type[Schema],
    values: dict[str, tuple[Any, str]],
    where: str,
    partial: Collection[str] | None = None,
) -> Schema:
    """Fill `schema` from dotted keys, each with its value and where that was written."""
    known = dict(fields(schema))
    sections = {name.rpartition(".")[0] for name in known} - {""}
    leaves: dict[str, Any] = {}
    mappings: dict[str, str] = {}  # given key by key, and where the last one was written
    for name, (value, origin) in values.items():
        if name in known:
            leaves[name] = convert(value, known[name].hint, f"{origin}: {name}")
        elif (name in sections or not name) and value in (None, {}):
            continue
        elif (owner := _mapping_above(name, known)) is not None:
            inside = leaves.setdefault(owner, {})
            if not isinstance(inside, dict):
                raise ConfigError(
                    f"{origin}: {name}: {owner} is {dump(inside)}, no mapping; give {owner} as one"
                )
            *path, leaf = name[len(owner) + 1 :].split(".")
            for part in path:
                inside = inside.setdefault(part, {})
                if not isinstance(inside, dict):
                    raise ConfigError(f"{origin}: {name}: {part} is no mapping")
            inside[leaf] = value
            mappings[owner] = origin
        elif partial is None or (name.partition(".")[0] in sections.difference(partial)):
            nearest = _nearest(name, known, sections)
            raise ConfigError(f"{origin}: {cut(name)}: no such key{nearest}")
    for name, origin in mappings.items():
        leaves[name] = convert(leaves[name], known[name].hint, f"{origin}: {name}")
    try:
        return _construct(schema, "", leaves)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting: its type, default and metadata."""

    hint: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def help(self) -> str:
        return self.metadata.get("help", "")


def fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every setting of `schema` by its dotted key, in the order they are written."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name], f"{name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield name, Field(hints[field.name], default, field.metadata)


def describe(schema: type, prefix: str = "") -> str:
    """Every key with its default and help, a line each, for `--help`."""
    rows = []
    for name, field in fields(schema, prefix):
        default = "required" if field.default is dataclasses.MISSING else dump(field.default)
        rows.append((f"{name}={default}", field.help))
    width = min(40, max((len(left) for left, _ in rows), default=0))
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def absolute(path: str) -> str:
    """The path from the root, so that it means the same in every working directory.

    Without `..` where that leads to the same place: past a link to a folder it does not.
    """
    short = os.path.abspath(path)
    same = os.path.realpath(short) == os.path.realpath(path)
    return short if same else str(Path(path).absolute())


def with_absolute_paths(config: Any) -> dict[str, Any]:
    """The settings of a dataclass, and of those in it, with every path absolute."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = with_absolute_paths(value)
        elif field.metadata.get("path") and isinstance(value, str):
            value = absolute(value)
        found[field.name] = value
    return found


def _replace(
    values: dict[str, tuple[Any, str]], name: str, value: tuple[Any, str], whole: Collection[str]
) -> None:
    """Set `name`, in place of what was set of it before."""
    if name in whole:
        for part in [key for key in values if key.startswith(f"{name}.")]:
            del values[part]
    values.pop(name, None)  # its parts, if any, come after it
    values[name] = value


def _read(
    path: Path, above: tuple[str, ...], whole: Collection[str]
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(dotted key, (value, file)) of a file's base and then of the file itself."""
    real = os.path.realpath(path)
    if real in above:
        raise ConfigError(f"{path}: its base files form a circle")
    if len(above) > _MOST_BASES:
        raise ConfigError(f"{path}: it is the base of a base of a base, {len(above)} deep")
    content = _parse(_text(path), str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of keys; it is {shown(content)}")
    base = content.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base must name a file; it is {shown(base)}")
        yield from _read(path.parent / base, (*above, real), whole)
    seen = set()
    for name, value in _flatten(content, "", whole):
        if name in seen:
            raise ConfigError(f"{path}: the key {cut(name)} is there twice")
        seen.add(name)
        yield name, (value, str(path))


def _text(path: Path) -> str:
    """What a file holds; one that may never end, as a pipe, is not opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir():
            raise ConfigError(f"{path}: cannot be read as a configuration (it is no regular file)")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text; save it as UTF-8"
        where = path if len(str(path)) < 400 else cut(str(path))
        raise ConfigError(f"{where}: cannot be read as a configuration ({reason})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return plain.parse(text)
    except plain.Malformed as error:
        line = f", line {error.line}" if error.line else ""
        raise ConfigError(f"{where}{line}: not valid YAML ({error})") from None


def _flatten(value: Any, prefix: str, whole: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested mappings, down to the settings that are given as a whole."""
    if isinstance(value, dict) and value and prefix not in whole:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key, whole)
    else:
        yield prefix, value


def _whole(schema: type) -> set[str]:
    """The settings that are replaced as a whole: all but those that can only be a mapping."""
    return {
        name
        for name, field in fields(schema)
        if not all(typing.get_origin(kind) is dict for kind in choices(field.hint))
    }


def _mapping_above(name: str, known: dict[str, Field]) -> str | None:
    """The setting of mapping type that the dotted key `name` lies in."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        if owner in known and any(
            typing.get_origin(kind) is dict for kind in choices(known[owner].hint)
        ):
            return owner
    return None


def _nearest(name: str, known: dict[str, Field], sections: set[str]) -> str:
    if name in sections:
        return f"; {name} is a section, set one of its keys"
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    close = same_leaf or difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not close:
        by_leaf = {key.rpartition(".")[2]: key for key in known}
        close = [by_leaf[found] for found in difflib.get_close_matches(leaf, list(by_leaf), n=1)]
    return f"; did you mean {close[0]}?" if close else "; see --help for all keys"


def _construct(schema: type, prefix: str, leaves: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(schema)
    arguments = {}
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _construct(hints[field.name], f"{name}.", leaves)
        elif name in leaves:
            arguments[field.name] = leaves[name]
            check(name, leaves[name], field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name} is missing; it has no default")
    return schema(**arguments)
