"""A setting's value: made into the type that it must have, and held within its limits."""

from __future__ import annotations

import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from data import values as plain
from data.values import dump_line as dump

_LARGEST = (1 << 63) - 1  # of a whole number: what C, files and tensors can hold
_SHOWN = 100  # characters of a value in a message
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}
# YAML 1.1's words for true and false, where one of these is wanted.
_SWITCHES = {
    **dict.fromkeys(("yes", "on"), True),
    **dict.fromkeys(("no", "off"), False),
}


class ConfigError(ValueError):
    """Something the user can mend; the message is one line. Commands print it and exit with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type by itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ConfigError for a number outside its limits, or text that can be no path."""
    if isinstance(value, str) and metadata.get("path"):
        longest = max(len(os.fsencode(part)) for part in value.split("/"))
        if not value.strip() or not value.isprintable() or longest > 255 or len(value) > 1000:
            raise ConfigError(
                f"{name} is {shown(value)}; it must be a path, without control characters, of "
                "names of at most 255 bytes"
            )
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        limits = {key: metadata[key] for key in _LIMITS if key in metadata}
        if isinstance(value, int) and abs(value) > _LARGEST:
            limits = {"least": -_LARGEST, "most": _LARGEST} | limits
        if not all(_LIMITS[key][1](value, limit) for key, limit in limits.items()):
            wanted = " and ".join(f"{_LIMITS[key][0]} {limit}" for key, limit in limits.items())
            raise ConfigError(f"{name} is {shown(value)}; it must be {wanted}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that `hint` says.

    Raises:
        ConfigError: it is of none of these; `where` begins the message.
    """
    for kind in choices(hint):
        try:
            return _convert_one(value, kind, where)
        except TypeError:
            continue
    quoted = ", in quotes" if str in choices(hint) and isinstance(value, (int, float)) else ""
    raise ConfigError(f"{where} is {shown(value)}; it must be {_name(hint)}{quoted}")


def _convert_one(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`; TypeError if it is none."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        for choice in typing.get_args(kind):
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
    elif origin is list:
        if isinstance(value, list):
            (inner,) = typing.get_args(kind)
            return [convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            keys, items = typing.get_args(kind)
            return {
                convert(key, keys, f"{where}: a key"): convert(
                    item, items, f"{where}[{cut(str(key))}]"
                )
                for key, item in value.items()
            }
    elif kind is types.NoneType:
        if value is None:
            return None
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _SWITCHES:
            return _SWITCHES[value.lower()]
    elif kind is float or kind is int:
        number = _number(value)
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    elif isinstance(value, kind):
        return value
    raise TypeError


def _number(value: Any) -> int | float | None:
    """A finite number, also as text spells it, that a float can hold; None for anything else."""
    if isinstance(value, str):
        return plain.number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= sys.float_info.max else None


def shown(value: Any) -> str:
    """A value as YAML writes it, but not all of a long one."""
    return cut(dump(value))


def cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names = []
    for kind in choices(hint):
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
