"""Settings of `parallel`. Imports no torch, so that a config is read and checked at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Attention = Literal["balanced", "ring", "ulysses", "allgather"]
Experts = Literal["weights", "rows", "auto"]


@dataclass
class ParallelConfig:
    attention: Attention = field(
        default="balanced",
        metadata={
            "help": "how full attention is divided over ranks: balanced plans whole sequences and "
            "rings by length; ring takes the ranks that hold a sequence in order; ulysses divides "
            "heads; allgather fetches all earlier keys and values of a sequence"
        },
    )
    experts: Experts = field(
        default="weights",
        metadata={
            "help": "what travels where MLPs are experts: weights, as ZeRO shares out any others, "
            "or rows, tokens' inputs to the ranks that hold their experts, and results back; auto: "
            "in each layer what should be fewer bytes"
        },
    )
    routing: bool = field(
        default=True,
        metadata={
            "help": "what attention sends between nodes goes over all ranks and NICs of a node; "
            "false: from one rank to one, to measure what routing brings"
        },
    )
    cluster: str | None = field(
        default=None,
        metadata={
            "help": "by whose speeds plans are priced: a800, h200, h800, or a file that "
            "`python -m parallel measure` wrote (null: by the GPU's name)",
            "path": True,
        },
    )
    speeds: dict[int, float] = field(
        default_factory=dict,
        metadata={
            "help": "measured speeds of ranks that are slower than the others, as shares of "
            "theirs: {17: 0.8} gives rank 17 four fifths of another's work"
        },
    )
    timeout_s: float = field(
        default=600.0,
        metadata={
            "help": "seconds that a rank waits in a layer for another before it gives up",
            "above": 0,
            "most": 1e7,
        },
    )
