"""Numerics across ranks. Knows process groups and plans; wraps the kernels."""

from parallel.layers import linear_attention, short_convolution, softmax_attention
from parallel.stream import Shard, cut, distribute, shard
from parallel.world import World, join

__all__ = [
    "Shard",
    "World",
    "cut",
    "distribute",
    "join",
    "linear_attention",
    "shard",
    "short_convolution",
    "softmax_attention",
]
