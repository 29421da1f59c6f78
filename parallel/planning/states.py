"""The price of passing the states of a linear layer from rank to rank, as `passing` says."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from parallel.planning.costs import MATMUL_WORK, Costs, States, Traffic, move_time
from parallel.planning.passes import passes_of
from parallel.planning.passing import TURNS, Block, Passing, least_heads

if TYPE_CHECKING:
    from parallel.planning.layout import Array, Plan


_KERNELS = 3  # that a pass over fragments launches besides those of the op


def price_states(plan: Plan, costs: Costs) -> tuple[float, Traffic]:
    """Seconds that one linear layer spends on states, forward and backward, and bytes sent.

    Three sums: the passes over the tokens of cut sequences, on the rank that takes longest forward
    and on the one that does backward, and their launches; for each turn the time by which it
    exceeds its share (1 / `TURNS`) of the arithmetic beside it; the tokens before each fragment
    that the convolution waits for. All are zero if `costs.states` is None or no sequence is cut.
    """
    stream, ranks, states = plan.stream, plan.topology.ranks, costs.states
    traffic = Traffic(np.zeros(ranks), np.zeros(ranks))
    if states is None or not plan.crossing:
        return 0.0, traffic
    further = pass_seconds(plan, states).max(axis=1)
    seconds = float((further + _KERNELS * costs.launch * (further > 0)).sum())
    piece = float(stream.tokens.max()) * states.beside / TURNS
    least = least_heads(states.M_bytes + states.E_bytes)
    for way, products in zip((1, -1), MATMUL_WORK.tolist(), strict=True):
        chains = [
            Passing(stream.rank[rows][::way].tolist(), states.heads, plan.topology, least).blocks()
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
    if states.halo_bytes:
        before = stream.rank[np.concatenate([rows[:-1] for rows in plan.crossing])]
        after = stream.rank[np.concatenate([rows[1:] for rows in plan.crossing])]
        size = np.full(len(before), states.halo_bytes)
        spent, sent, got = move_time(before, after, size, plan.topology, costs)
        seconds += 2 * (spent + costs.latency(sent))
        traffic += sent + got  # the gradients go back
    return seconds, traffic


def pass_seconds(plan: Plan, states: States) -> Array:
    """Seconds that each rank spends on passes over its fragments: float64 (2, ranks).

    Forward and backward; see `parallel.planning.passes`.
    """
    stream, ranks = plan.stream, plan.topology.ranks
    every = np.concatenate(plan.crossing)
    sizes = np.array([len(rows) for rows in plan.crossing])
    last = np.repeat(sizes - 1, sizes)
    number = np.arange(len(every)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    made, each = passes_of(number, last), states.passes
    tokens = (stream.end - stream.start)[every]
    further = tokens * made.map * each.map, tokens * made.gradient * each.gradient
    slow = plan.topology.seconds
    return np.stack([np.bincount(stream.rank[every], x, ranks) * slow for x in further])


def _sent(blocks: list[Block], states: States) -> tuple[Array, Array, Array]:
    """Source, target and bytes, (messages,) each, of a turn's messages between different ranks.

    The same as `Block.messages`, in numpy: blocks of one turn are all gathered, or none is.
    """
    gathered = any(block.gathered for block in blocks)
    counts, times = np.array(
        [(len(block.holders), len(block.parts)) for block in blocks] or [(0, 0)]
    ).T
    holder = _flat(block.holders for block in blocks)
    whole = gathered & (_flat(block.numbers for block in blocks) > 0)
    parts = [(rank, end - first) for block in blocks for rank, (first, end) in block.parts]
    rank, heads = np.array(parts, np.int64).reshape(-1, 2).T  # (parts,) each
    # The product of each block's items with its parts: one message for each (item, part).
    begin, times = np.repeat(np.cumsum(times) - times, counts), np.repeat(times, counts)
    part = np.arange(times.sum()) + np.repeat(begin - np.cumsum(times) + times, times)
    holder, rank = np.repeat(holder, times), rank[part]
    size = heads[part] * (states.E_bytes + np.repeat(whole, times) * states.M_bytes)
    away = holder != rank
    ends = (holder[away], rank[away]) if gathered else (rank[away], holder[away])
    return *ends, size[away]


def _flat(lists: Iterable[Iterable[int]]) -> Array:
    return np.fromiter(chain.from_iterable(lists), np.int64)
