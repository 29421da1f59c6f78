"""A source's weight."""

from __future__ import annotations

import math
from typing import Any

import yaml

from data.settings import ConfigError, dump

_HEAVIEST = 1e30  # weights are summed and multiplied by tokens


def weight(value: Any, where: str) -> float:
    """A share of the tokens: a number, also one that YAML takes for text, such as 1e-3.

    Raises:
        ConfigError: it is none, not finite, below 0, or too large to reckon with.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not 0 <= found <= _HEAVIEST:
        raise ConfigError(
            f"{where} is {shortened(value)}; it must be a number from 0 to {_HEAVIEST:g}"
        )
    return found


def shortened(value: Any) -> str:
    """A value as it was written, but not all of a long one."""
    try:
        text = dump(value)
    except (ValueError, yaml.YAMLError):  # a number of thousands of digits, a thing of Python
        text = type(value).__name__
    return text if len(text) <= 100 else f"{text[:100]}…"
