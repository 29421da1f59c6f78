"""What a YAML file says of the fields of a dataclass: of a cluster, a model, lengths."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

SHOWN = 200  # characters of what is shown of a file
_MOST = 1e12  # of a number
_LONGEST = 1 << 20  # characters of a file


def mapping(path: Path, schema: type, unknown: str) -> dict[Any, Any]:
    """What a YAML file says of the fields of the dataclass `schema`.

    Raises:
        ValueError: no such file (the message begins with `unknown`), or it is no mapping.
    """
    if not os.path.isfile(path):  # no error for a name that is too long for one
        raise ValueError(f"{unknown}, or the path of a YAML file")
    return checked(path, schema, document(path))


def checked(at: Path | str, schema: type, content: Any) -> dict[Any, Any]:
    """`content`, if it is a mapping at all: ValueError else."""
    if not isinstance(content, dict):
        keys = ", ".join(sorted(each.name for each in fields(schema)))
        raise ValueError(f"{at}: it must be a mapping of keys to numbers; the keys are {keys}")
    return content


def numbers(
    at: Path | str, schema: type, content: dict[Any, Any], given: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A mapping whose keys are fields of the dataclass `schema` and whose values are above 0.

    Args:
        at: what the message of an error begins with.
        given: fields that do not come from `content`.

    Raises:
        ValueError: a wrong key or value.
    """
    known = {each.name: each for each in fields(schema)}
    needed = [name for name, each in known.items() if each.default is MISSING and name not in given]
    keys = f"the keys are {', '.join(sorted(known))}"
    if extra := sorted({str(key)[:SHOWN] for key in content if key not in known}):
        raise ValueError(f"{at}: unknown {', '.join(extra)[:SHOWN]}; {keys}")
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{at}: {', '.join(missing)} must be given; {keys}")
    for key, value in content.items():
        whole = known[key].type in (int, "int")
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value <= _MOST:
            raise ValueError(
                f"{at}: {key} is {str(value)[:SHOWN]!r}; it must be a "
                f"{'whole ' if whole else ''}number above 0, at most {_MOST:.0e}"
            )
    return content


def document(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: it cannot be read, or is no YAML; the message is one line that names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text):,} characters are more than {_LONGEST:,}")
        return yaml.safe_load(text)
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except RecursionError:
        reason = "it is nested too deep"
    except OSError as error:
        reason = error.strerror or "no file"
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:SHOWN]
    raise ValueError(f"{path}: cannot be read as YAML ({reason})")
