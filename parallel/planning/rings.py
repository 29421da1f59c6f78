"""What the rings of a plan take: all of them at once, as tables of rings and of their members.

A ring's member is one of its ranks. Members of all rings are numbered through, ring by ring, each
ring's in the order of `Ring.members`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.costs import ATTENTION_WORK, RING_TRAFFIC, Costs, Traffic

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Plan, Topology


@dataclass(frozen=True)
class Members:
    """The members of some rings.

    Attributes:
        rank: int64 (members,).
        shapes: int64 (rings, 3), of each ring's grid: nodes, seats a node, slices.
        topology: of the ranks.
    """

    rank: Array
    shapes: Array
    topology: Topology

    @staticmethod
    def of(grids: Sequence[Array], topology: Topology) -> Members:
        """The members of rings with these grids, at least one; a grid is as `Ring.ranks`."""
        rank = np.concatenate([grid.reshape(-1) for grid in grids])
        return Members(rank, np.array([grid.shape for grid in grids]), topology)

    @cached_property
    def size(self) -> Array:
        """int64 (rings,): members of each ring."""
        return self.shapes.prod(axis=1)

    @cached_property
    def first(self) -> Array:
        """int64 (rings,): number of each ring's first member."""
        return np.cumsum(self.size) - self.size

    @cached_property
    def ring(self) -> Array:
        """int64 (members,): the ring of each."""
        return np.repeat(np.arange(len(self.size)), self.size)

    @cached_property
    def after(self) -> tuple[Array, Array]:
        """The member to which each hands on blocks, on the inner ring and on the outer one."""
        nodes, each, slices = self.shapes[self.ring].T
        first = self.first[self.ring]
        seat, piece = np.divmod(np.arange(len(self.rank)) - first, slices)
        node, local = np.divmod(seat, each)
        inner = (node * each + (local + 1) % each) * slices + piece
        outer = ((node + 1) % nodes * each + local) * slices + piece
        return first + inner, first + outer

    @cached_property
    def leaves(self) -> tuple[Array, Array]:
        """bool (members,) each: whether the next one on either ring is on another node."""
        node = self.topology.node(self.rank)
        inner, outer = self.after
        return node != node[inner], node != node[outer]

    def largest(self, values: Array) -> Array:
        """(members,) -> (rings,): the largest of each ring."""
        return np.maximum.reduceat(values, self.first)

    def travel(self, block: Array, costs: Costs, waves: int = 1) -> Array:
        """float64 (rings,): forward seconds of transfers if blocks have so many bytes (rings,)."""
        nodes, each, slices = self.shapes.T
        if costs.routed:
            across = block / costs.between + 2 * block / costs.inside
        else:
            # Every slice of heads has its own ring, and all those of a seat cross there.
            pairs = np.minimum(slices, self.topology.ranks_per_node)
            across = block * np.maximum(1 / costs.nic, pairs / costs.between)
        a_hop = np.where(
            self.largest(self.leaves[0]),
            waves * costs.latency_between + across,
            waves * costs.latency_inside + block / costs.inside,
        )
        on_node = np.minimum(each * slices, self.topology.ranks_per_node)
        mine = 1.0 if costs.routed else on_node / self.topology.ranks_per_node
        outer = waves * costs.latency_between + on_node * block / (costs.between * mine)
        return np.maximum(nodes * (each - 1) * a_hop, (nodes - 1) * outer)

    def seconds(self, work: Array, block: Array, costs: Costs, waves: int = 1) -> Array:
        """float64 (2, rings): how long each ring takes, forward and backward.

        Args:
            work: forward seconds of the member that computes longest, (rings,).
            block: bytes of the largest block, (rings,).
        """
        # Each round has kernels of its own, in either pass.
        launched = (self.shapes[:, 0] * self.shapes[:, 1] - 1) * waves * costs.launch
        computed = np.outer(ATTENTION_WORK, work) + launched
        return np.maximum(computed, np.outer(RING_TRAFFIC, self.travel(block, costs, waves)))

    def sent(self, block: Array) -> Traffic:
        """Bytes that each rank sends forward; `block` is each member's own, (members,)."""
        inner, outer = self.after
        leaves, far = self.leaves
        # On the inner ring a member hands on all blocks but those of the member that it hands
        # them to; on the outer one, those of its peers on all nodes but the next.
        _, each, slices = self.shapes[self.ring].T
        place = np.arange(len(block)) - self.first[self.ring]
        column = self.first[self.ring] + place % (each * slices)
        peers = np.bincount(column, block, len(block))[column]
        whole = self.first[self.ring] + place % slices
        total = np.bincount(whole, block, len(block))[whole]
        on_ring, on_column = total - peers[inner], peers - block[outer]
        ranks = self.topology.ranks
        return Traffic(
            np.bincount(self.rank, on_ring * ~leaves + on_column * ~far, ranks),
            np.bincount(self.rank, on_ring * leaves + on_column * far, ranks),
        )


def chunk_seconds(plan: Plan, rows: Array, costs: Costs) -> Array:
    """Forward seconds of spans of `plan.attention` that are chunks of rings, with all heads.

    Args:
        rows: int64 (chunks,), their rows in that table: every chunk of a sequence is among them.

    Returns:
        float64 (chunks,).
    """
    layout = plan.attention
    start, end = layout.start[rows], layout.end[rows]
    token = plan.cu_seqlens[layout.sequence[rows]] + start
    order = np.argsort(layout.piece[rows] * plan.cu_seqlens[-1] + token, kind="stable")
    tiles = costs.tiles(end - start)[order]
    before = np.cumsum(tiles) - tiles
    before -= np.maximum.accumulate(np.where(start[order] == 0, before, 0))
    seconds = np.empty(len(rows))
    seconds[order] = costs.tile_seconds * tiles * (before + (tiles + 1) / 2)
    return seconds
