"""Numerics across ranks. Knows process groups and plans; wraps the kernels.

The whole idea. There is no grid of data- and sequence-parallel ranks. A batch is one stream of
sequences, shared out over all ranks: each holds about as many tokens (a *shard*), in a few
*fragments* of sequences. What a fragment needs from elsewhere depends on the layer:

    embedding, norm, MLP, loss   nothing
    convolution, window          the last tokens before it (`stream.View.halo`, `reaching`)
    linear attention, scan       the state that enters it, whatever its length (`chain`)
    full attention               the keys of its sequence: quadratic work, which has an even
                                 layout of its own, to which q, k and v move and from which o
                                 comes back (`attention`, `rings`)

A *plan* says where every token lies in both layouts. It follows from the lengths alone, so each
rank makes it for itself, beside the step before (`planner`). First come the ranks that attend to
each sequence: few for a short one, a ring over nodes for a long one, and quadratic work is even
(`placing`). Then the stream, near them: tokens stay on their node but for what evens shards out
(`ordering`). Where that would move many, a node with more of attention's work keeps fewer tokens
instead, as far as memory allows, and all work is even rather than each kind of it; or nothing
moves, and every rank keeps what it attends to (`owners`). The cheapest of several such plans is
taken (`plan`), by what attention and the rest cost (`cost`) and what the states of linear layers do
(`states`). Layers see a shard and call the functions below; gradients come back the way that their
tensors went (`exchange`).

What travels does so beside what needs none of it: one wave of heads beside the attention of others
and their projections, states beside pieces of the output's gate (`layers`).

Names are imported when they are first used, so that settings and plans, which know no torch,
come without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.config import ParallelConfig
    from parallel.layers import (
        SoftmaxAttention,
        diagonal_scan,
        linear_attention,
        short_convolution,
        softmax_attention,
    )
    from parallel.peers import LostRankError, at_step
    from parallel.planning.heads import Waves
    from parallel.planning.planner import FullAttention, Planner
    from parallel.stream import distribute, shard
    from parallel.travel.view import Shard
    from parallel.world import World, join

__all__ = [
    "FullAttention",
    "LostRankError",
    "ParallelConfig",
    "Planner",
    "Shard",
    "SoftmaxAttention",
    "Waves",
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
    "parallel.planning.heads": ["Waves"],
    "parallel.layers": [
        "SoftmaxAttention",
        "diagonal_scan",
        "linear_attention",
        "short_convolution",
        "softmax_attention",
    ],
    "parallel.peers": ["LostRankError", "at_step"],
    "parallel.planning.planner": ["FullAttention", "Planner"],
    "parallel.stream": ["Shard", "distribute", "shard"],
    "parallel.world": ["World", "join"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'parallel' has no attribute {name!r}")
