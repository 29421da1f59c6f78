"""Numerics across ranks. Knows process groups and plans; wraps the kernels.

Names are imported when they are first used, so that settings and plans, which know no torch,
come without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.config import ParallelConfig
    from parallel.layers import (
        diagonal_scan,
        linear_attention,
        short_convolution,
        softmax_attention,
    )
    from parallel.peers import LostRankError, at_step
    from parallel.planner import FullAttention, Planner
    from parallel.stream import Shard, distribute, shard
    from parallel.world import World, join

__all__ = [
    "FullAttention",
    "LostRankError",
    "ParallelConfig",
    "Planner",
    "Shard",
    "World",
    "at_step",
    "diagonal_scan",
    "distribute",
    "join",
    "linear_attention",
    "shard",
    "short_convolution",
    "softmax_attention",
]

_HOMES = {
    "parallel.config": ["ParallelConfig"],
    "parallel.layers": [
        "diagonal_scan",
        "linear_attention",
        "short_convolution",
        "softmax_attention",
    ],
    "parallel.peers": ["LostRankError", "at_step"],
    "parallel.planner": ["FullAttention", "Planner"],
    "parallel.stream": ["Shard", "distribute", "shard"],
    "parallel.world": ["World", "join"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'parallel' has no attribute {name!r}")
