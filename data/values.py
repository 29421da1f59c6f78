"""YAML text to plain values: mappings, lists, text, finite numbers, true, false and null.

The scalars are those of YAML 1.2's core schema. What YAML 1.1 makes of other text (a date, 1:30
as ninety, 010 as eight, `no` as false) is text here, so that a run may be called 2026-11-30, and
what is no number, .inf among it, is refused where a number is wanted.

What comes back is small and finite: anchors are copied out, and neither one inside itself nor one
that stands for a billion values gets far.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

_MOST_CHARACTERS, _MOST_VALUES, _MOST_DEPTH = 1 << 20, 100_000, 60
_MOST_DIGITS = 60  # of a number; a longer one is text

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_WHOLE = re.compile(r"[-+]?(0|[1-9](_?[0-9])*)")
_OTHER_BASE = re.compile(r"0(x[0-9a-fA-F]+|o[0-7]+|b[01]+)")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9](_?[0-9])*\.?[0-9]*)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_PLAIN, _YAML = "!plain", "tag:yaml.org,2002:"


class Malformed(ValueError):  # noqa: N818
    """Text that is no YAML, or stands for no value; `line` counts from 1, None if unknown."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Tags scalars by how they are written, and leaves it to us what they are."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


_Loader.add_implicit_resolver(_PLAIN, re.compile(""), None)


class _Dumper(yaml.SafeDumper):
    """Quotes what is text here but in YAML 1.1, and text that is a number only here (1e6)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _number in (_WHOLE, _OTHER_BASE, _DECIMAL):
    _Dumper.add_implicit_resolver("!number", re.compile(f"(?:{_number.pattern})$"), None)


def parse(text: str) -> Any:
    """The value that a YAML document stands for; None for an empty one.

    Raises:
        Malformed: with the reason, on one line.
    """
    if len(text) > _MOST_CHARACTERS:
        raise Malformed(f"{len(text):,} characters are more than {_MOST_CHARACTERS:,}")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = str(error.problem)
        if reason.startswith("but"):
            reason = f"{error.context}, {reason}"
        raise Malformed(reason, mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        raise Malformed(f"{error.reason}, character {error.position + 1}") from None
    except RecursionError:
        raise _too_deep(None) from None
    return None if node is None else _Values().of(node, 0)


def dump(value: Any) -> str:
    """`value` as YAML, a line a key; `parse` gives it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def dump_line(value: Any) -> str:
    """`value` as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf)
    lines = text.removesuffix("...\n").strip().splitlines()
    return lines[0] if len(lines) == 1 else json.dumps(value)


def number(text: str) -> int | float | None:
    """The finite number that text spells, in ASCII; None if it spells none."""
    if len(text) > _MOST_DIGITS:
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _DECIMAL.fullmatch(text):
        found = float(text)
        return found if math.isfinite(found) else None
    return None


class _Values:
    """Counts what it has made, wherever in the document that is."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, node: yaml.Node, depth: int) -> Any:
        line = node.start_mark.line + 1
        self.count += 1
        if self.count > _MOST_VALUES:
            raise Malformed(f"it stands for more than {_MOST_VALUES:,} values", line)
        if depth > _MOST_DEPTH:
            raise _too_deep(line)
        if node.tag not in (_PLAIN, f"{_YAML}str", f"{_YAML}map", f"{_YAML}seq"):
            shown = node.tag.replace(_YAML, "!!")
            raise Malformed(f"the tag {shown} means nothing here; write the value alone", line)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        return [self.of(item, depth + 1) for item in node.value]

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not _text(key_node).strip():
                raise Malformed("a key must be a word", line)
            key, value = _text(key_node), self.of(value_node, depth + 1)
            if key == "<<" and key_node.tag == _PLAIN:
                mappings = value if isinstance(value, list) else [value]
                if not all(isinstance(mapping, dict) for mapping in mappings):
                    raise Malformed("<< stands before a mapping, or a list of them", line)
                for mapping in mappings:  # the first of them counts
                    merged = mapping | merged
            elif key in found:
                raise Malformed(f"the key {key} is there twice", line)
            else:
                found[key] = value
        return merged | found


def _scalar(node: yaml.ScalarNode) -> Any:
    """What is quoted is text, and what is not may be."""
    text = _text(node)
    if node.tag != _PLAIN or _LEADING_ZERO.fullmatch(text):
        return text
    if text in _WORDS:
        return _WORDS[text]
    found = number(text)
    return text if found is None else found


def _text(node: yaml.ScalarNode) -> str:
    if _UNUSABLE.search(node.value):
        raise Malformed("text must be of whole characters, without NUL", node.start_mark.line + 1)
    return node.value


def _too_deep(line: int | None) -> Malformed:
    return Malformed(f"it is nested more than {_MOST_DEPTH} deep; is an anchor in itself?", line)
