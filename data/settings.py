"""Settings: nested dataclasses, read from YAML files and `key=value` overrides.

Every room keeps the dataclass of its own settings; this module fills them and knows none.
Each field's `metadata["help"]` is its line in `--help`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

COMMAND_LINE = "command line"

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """Something the user can mend; the message is one line. Commands print it and exit with 2."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and its line of help."""
    metadata = {"help": help}
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
            read first; mappings merge, anything else replaces.
        overrides: `section.key=value`, the value in YAML.
        partial: for a command that reads only its part of a run's file: the sections of
            which the schema has some keys. Their other keys are passed over, and so are
            sections that it does not have. None: every key must be known.

    Raises:
        ConfigError: naming the file, the key and what would be right.
    """
    values: dict[str, tuple[Any, str]] = {}
    for name, value in _read(Path(path), ()):
        values[name] = value
    override(values, overrides)
    return build(schema, values, str(path), partial)


def override(values: dict[str, tuple[Any, str]], overrides: Sequence[str]) -> None:
    """Set in `values`, as `build` takes them, what `key=value` words say.

    Raises:
        ConfigError: a word is not of that form, or its value is no YAML.
    """
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{COMMAND_LINE}: {word!r} is not of the form key=value")
        for name, leaf in _flatten(_parse(text, f"{COMMAND_LINE}: {key}"), key.strip()):
            values[name] = (leaf, COMMAND_LINE)


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
    for name, (value, origin) in values.items():
        if name in known:
            leaves[name] = _convert(value, known[name].hint, f"{origin}: {name}")
        elif (name in sections or not name) and value in (None, {}):
            continue
        elif (owner := _mapping_above(name, known)) is not None:
            inside = leaves.setdefault(owner, {})
            *path, leaf = name[len(owner) + 1 :].split(".")
            for part in path:
                inside = inside.setdefault(part, {})
                if not isinstance(inside, dict):
                    raise ConfigError(f"{origin}: {name}: {part} is no mapping")
            inside[leaf] = value
        elif partial is None or (name.partition(".")[0] in sections.difference(partial)):
            raise ConfigError(f"{origin}: {name}: no such key{_nearest(name, known, sections)}")
    try:
        return _construct(schema, "", leaves)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting: its type, default and line of help."""

    hint: Any
    default: Any
    help: str


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
        yield name, Field(hints[field.name], default, field.metadata.get("help", ""))


def describe(schema: type, prefix: str = "") -> str:
    """Every key with its default and help, a line each, for `--help`."""
    rows = []
    for name, field in fields(schema, prefix):
        shown = "required" if field.default is dataclasses.MISSING else dump(field.default)
        rows.append((f"{name}={shown}", field.help))
    width = min(40, max(len(left) for left, _ in rows))
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def dump(value: Any) -> str:
    """`value` as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n...")[0].strip()


def _read(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(dotted key, (value, file)) of a file's base and then of the file itself."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: its base files form a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read as a configuration ({reason})") from None
    content = _parse(text, str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of keys; it is {type(content).__name__}")
    base = content.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base must name a file; it is {dump(base)}")
        yield from _read(path.parent / base, (*above, path.resolve()))
    for name, value in _flatten(content, ""):
        yield name, (value, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"{where}{line}: not valid YAML ({problem})") from None


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _mapping_above(name: str, known: dict[str, Field]) -> str | None:
    """The setting of mapping type that the dotted key `name` lies in."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        if owner in known and any(
            typing.get_origin(kind) is dict for kind in _choices(known[owner].hint)
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
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name} is missing; it has no default")
    return schema(**arguments)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type by itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _convert(value: Any, hint: Any, where: str) -> Any:
    for kind in _choices(hint):
        try:
            return _convert_one(value, kind, where)
        except TypeError:
            continue
    raise ConfigError(f"{where} is {dump(value)}; it must be {_name(hint)}")


def _convert_one(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`; TypeError if it is none."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        if value in typing.get_args(kind):
            return value
    elif origin is list:
        if isinstance(value, list):
            (inner,) = typing.get_args(kind)
            return [_convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return value
    elif kind is types.NoneType:
        if value is None:
            return None
    elif kind is float or kind is int:
        number = _number(value)
        if number is not None and (kind is float or float(number).is_integer()):
            return kind(number)
    elif isinstance(value, kind):
        return value
    raise TypeError


def _number(value: Any) -> int | float | None:
    """A number, also as YAML 1.1 misreads it: 3e-4 and 1e6 are text there."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return None


def _name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names = []
    for kind in _choices(hint):
        origin = typing.get_origin(kind)
        if origin is typing.Literal:
            names.append("one of " + ", ".join(dump(choice) for choice in typing.get_args(kind)))
        elif origin is list:
            names.append(f"a list (each item {_name(typing.get_args(kind)[0])})")
        elif origin is dict:
            names.append("a mapping")
        elif kind is types.NoneType:
            names.append("null")
        else:
            names.append(words.get(kind, str(kind)))
    return " or ".join(names)
