"""Settings of the room. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Attention = Literal["balanced", "ring", "ulysses", "allgather"]


@dataclass
class ParallelConfig:
    attention: Attention = field(
        default="balanced",
        metadata={
            "help": "how full attention crosses ranks: balanced plans whole sequences and rings "
            "by length; ring shares a sequence among the ranks that hold it; ulysses splits "
            "heads; allgather fetches all earlier keys and values of a sequence"
        },
    )
    timeout_s: float = field(
        default=600.0,
        metadata={"help": "seconds that a rank waits in a layer for another before it gives up"},
    )
