"""Settings of the room. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Attention = Literal["allgather"]


@dataclass
class ParallelConfig:
    attention: Attention = field(
        default="allgather",
        metadata={
            "help": "how full attention crosses ranks: allgather fetches all earlier keys and "
            "values of a sequence"
        },
    )
