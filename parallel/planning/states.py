"""What it costs to pass the states of linear layers from rank to rank (`passing`)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.costs import PRODUCTS, Costs, States, Traffic, move_time
from parallel.planning.passing import TURNS, Block, Passing

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Plan


def price_states(plan: Plan, costs: Costs) -> tuple[float, Traffic]:
    """Seconds of one linear layer's states, forward and backward, and what each rank sends.

    Nothing where `costs` knows of no such layer. Maps are made of all tokens of sequences that
    are cut; a turn costs what it takes longer than its piece of the arithmetic beside it.
    """
    stream, ranks, states = plan.stream, plan.topology.ranks, costs.states
    traffic = Traffic(np.zeros(ranks), np.zeros(ranks))
    if states is None or not plan.crossing:
        return 0.0, traffic
    every = np.concatenate(plan.crossing)
    mapped = np.bincount(stream.rank[every], (stream.end - stream.start)[every])
    seconds = float(mapped.max()) * states.map_flops / costs.flops
    piece = float(stream.tokens.max()) * states.beside_flops / costs.flops / TURNS
    for way, products in zip((1, -1), PRODUCTS.tolist(), strict=True):
        chains = [
            Passing(stream.rank[rows][::way].tolist(), states.heads, plan.topology).blocks()
            for rows in plan.crossing
        ]
        for turns in zip(*chains, strict=True):
            source, target, size = _sent([block for turn in turns for block in turn], states)
            if not len(source):
                continue
            spent, sent, _ = move_time(source, target, size, plan.topology, costs)
            spent += costs.latency(sent)
            seconds += max(0.0, spent - products * piece)
            traffic += sent
    return seconds, traffic


def _sent(blocks: list[Block], states: States) -> tuple[Array, Array, Array]:
    """Source, target and bytes of a turn's messages between two ranks: `Block.messages`."""
    gathered = any(block.gathered for block in blocks)
    counts, times = np.array(
        [(len(block.holders), len(block.parts)) for block in blocks] or [(0, 0)]
    ).T
    holder = _flat(block.holders for block in blocks)
    whole = gathered & (_flat(block.numbers for block in blocks) > 0)
    parts = [(rank, end - first) for block in blocks for rank, (first, end) in block.parts]
    rank, heads = np.array(parts, np.int64).reshape(-1, 2).T
    # Every item of a block meets every part of it.
    begin, times = np.repeat(np.cumsum(times) - times, counts), np.repeat(times, counts)
    part = np.arange(times.sum()) + np.repeat(begin - np.cumsum(times) + times, times)
    holder, rank = np.repeat(holder, times), rank[part]
    size = heads[part] * (states.E_bytes + np.repeat(whole, times) * states.M_bytes)
    away = holder != rank
    ends = (holder[away], rank[away]) if gathered else (rank[away], holder[away])
    return *ends, size[away]


def _flat(lists: Iterable[Iterable[int]]) -> Array:
    return np.fromiter(chain.from_iterable(lists), np.int64)
