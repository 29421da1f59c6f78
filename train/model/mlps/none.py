"""No MLP: the block is its mixer alone, with one norm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Config:
    pass


MLP = None
