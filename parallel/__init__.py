"""Numerics across ranks. Knows process groups and plans; wraps the kernels.

There is no grid of data- and sequence-parallel ranks. A batch is one *stream* of sequences, divided
over all P ranks. A rank's part is its *shard*; the part of a sequence in one shard is a *fragment*.
What a fragment needs from other ranks depends on the layer:

    embedding, norm, MLP, loss   nothing
    convolution, window          the last tokens before it (`View.halo`, `View.with_preceding`)
    linear attention, scan       the state that enters it, whatever its length (`travel.chain`)
    full attention               the keys of its sequence. The work is quadratic, so it has a
                                 layout of its own, in which it is even: q, k and v move there and
                                 o moves back (`travel.attention`, `travel.rings`)

A *plan* says where every token lies in both layouts. It follows from the lengths alone, so that
every rank makes it by itself, while the step before runs (`planning.planner`):

    placing     which ranks attend to each sequence: one for a short one, a ring inside a node for
                a middle one, a ring over nodes for a long one, so that quadratic work is even
    ordering    the stream near them: tokens stay on their node, but for what makes shards even

Two variants move fewer tokens. Shards may be uneven, within memory: a node with more attention
work gets fewer tokens, and the sum of all work is even (`Limits.uneven`). Or nothing moves, and
each rank keeps the tokens it attends to (`owners.in_groups`). The plan is the cheapest of several
(`planning.plan`) by the price of attention and the other work (`planning.cost`) and of the states
of linear layers (`planning.states`).

A model calls the functions below with a shard and never sees a plan. Gradients return the way that
their tensors went. Transfers overlap work that does not depend on them: a wave of heads overlaps
the attention and the projections of other waves, states overlap pieces of the output's gate.

The front: `layers` (what a model calls), `stream` (a batch to shards), `world` (the ranks), `peers`
(who is lost), `measure` (how fast this machine is), `bench` (what a cut costs), `config`. Under it
`planning`, `travel` and `simulation`. Names are imported when first used, so that settings and
plans come without torch.
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
    from parallel.travel.sequences import sum_of_sequences
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
    "sum_of_sequences",
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
    "parallel.travel.sequences": ["sum_of_sequences"],
    "parallel.world": ["World", "join"],
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'parallel' has no attribute {name!r}")
