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
    routing: bool = field(
        default=True,
        metadata={
            "help": "what attention sends between nodes goes over all ranks and NICs of a node; "
            "false: from one rank to one, to measure what routing brings"
        },
    )
    timeout_s: float = field(
        default=600.0,
        metadata={"help": "seconds that a rank waits in a layer for another before it gives up"},
    )
