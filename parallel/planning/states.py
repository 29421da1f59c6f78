"""The price of passing the states of a linear layer from rank to rank, as `passing` says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain

import numpy as np

from parallel.planning.costs import MATMUL_WORK, Costs, States, Traffic, move_time
from parallel.planning.layout import Array, Plan, Topology
from parallel.planning.passes import passes_of
from parallel.planning.passing import TURNS, Block, Passing, least_heads

_KERNELS = 3  # that a pass over fragments launches besides those of the op
_REMEMBERED = 1024  # runs of ranks whose messages are kept


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
    sent_by = _sent(plan.topology, states.heads, least_heads(states.M_bytes + states.E_bytes))
    for way, products in zip((1, -1), MATMUL_WORK.tolist(), strict=True):
        # Many sequences pass over the same ranks.
        alike = Counter(tuple(stream.rank[rows][::way].tolist()) for rows in plan.crossing)
        for turns in zip(*map(sent_by, alike), strict=True):
            times = np.repeat(list(alike.values()), [len(turn[0]) for turn in turns])
            source, target, heads, whole = np.concatenate(turns, axis=1)
            if not len(source):
                continue
            size = times * (heads * states.E_bytes + whole * states.M_bytes)
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


@lru_cache(8)
def _sent(topology: Topology, heads: int, least: int) -> Callable[[tuple[int, ...]], list[Array]]:
    """What a sequence's ranks send in each turn: a function of these, which remembers.

    It returns for each turn int64 (4, messages) of messages between different ranks: source,
    target, heads, and the heads of which M travels too.
    """

    none = np.zeros((4, 0), np.int64)

    @lru_cache(_REMEMBERED)
    def from_first(holders: tuple[int, ...]) -> list[Array]:
        blocks = Passing(holders, heads, topology, least).blocks()
        return [_messages(turn) if turn else none for turn in blocks]

    def turns(holders: tuple[int, ...]) -> list[Array]:
        # Ranks of one node send what as many ranks of the first node would; so do ranks of several
        # nodes, if these have as many as the first ones. Remembered are the messages of the first.
        lowest, highest = min(holders), max(holders)
        node, last = topology.node([lowest, highest]).tolist()
        alike = topology.sizes[node : last + 1] == topology.sizes[: last + 1 - node]
        first = int(topology.first[node]) if alike else 0
        if node == last and highest - lowest < topology.sizes[0]:
            first = lowest
        further = np.array([first, first, 0, 0])[:, None]
        return [turn + further for turn in from_first(tuple(x - first for x in holders))]

    return turns


def _messages(blocks: list[Block]) -> Array:
    """Those of `Block.messages` between different ranks, as `_sent` gives them.

    Blocks of one turn are all gathered, or none is.
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
    holder, rank, heads = np.repeat(holder, times), rank[part], heads[part]
    ends = (holder, rank) if gathered else (rank, holder)
    return np.stack([*ends, heads, heads * np.repeat(whole, times)])[:, holder != rank]


def _flat(lists: Iterable[Iterable[int]]) -> Array:
    return np.fromiter(chain.from_iterable(lists), np.int64)
