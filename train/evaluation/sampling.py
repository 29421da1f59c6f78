"""How text is drawn from a model. Light: nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data.settings import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to go on from a prompt.

    tokens: most to make. temperature: 0 takes the likeliest token. seed: of what is drawn.

    Raises:
        ConfigError: naming the first that is out of its range.
    """

    tokens: int
    temperature: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ConfigError(f"tokens is {self.tokens}; it must not be negative")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it must be a number, 0 or more")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to 2^64 − 1")
