"""Groups of ranks that share sequences in all layers: what most published systems do.

A *group* is adjacent ranks. Its sequences' tokens stay on its ranks in all layers; groups meet only
at the end of a step. In full attention a group works in one of the `forms`:

    ring           2G chunks of each sequence, keys go round: Transformer Engine's p2p
    double ring    the same over several nodes, by a ring inside each and one over them
    all-to-all     heads are exchanged for tokens (Ulysses, arXiv 2309.14509)
    both           all-to-all among h ranks, rings over G / h: Transformer Engine's a2a+p2p (USP,
                   arXiv 2405.07719)

Linear layers pass states between a group's ranks, or exchange heads for tokens as Megatron does for
Mamba, whichever is quicker. Transfers of rings overlap their arithmetic; all-to-alls overlap
nothing, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from parallel.planning.building import build
from parallel.planning.cost import price
from parallel.planning.costs import RING_TRAFFIC, Costs, Traffic
from parallel.planning.layout import Array, Plan, Topology
from parallel.planning.owners import Owners
from parallel.planning.states import pass_seconds, price_states
from parallel.simulation.case import BOTH, Case, Outcome, lower_bound

_MOST_PIECES = 50_000  # of sequences over the ranks of their groups that are laid out one by one
Grid = tuple[int, int, int]  # (rows, seats a row, slices), as in `layout.Ring`


def forms(size: int, topology: Topology, heads: int) -> Iterator[tuple[str, Grid]]:
    """The forms in which `size` adjacent ranks may share full attention, by name."""
    each = topology.ranks_per_node
    nodes = size // each if size > each and size % each == 0 else 1
    slices = [1 << i for i in range(size.bit_length()) if size % (1 << i) == 0]
    for h in slices:
        if h > heads:
            continue
        how = "ring" if h == 1 else "all-to-all" if h == size else f"all-to-all of {h}, ring"
        yield how, (1, size // h, h)
        if nodes > 1 and each % h == 0:
            yield how.replace("ring", "double ring"), (nodes, each // h, h)


def sizes(case: Case) -> list[int]:
    """Sizes of groups whose memory holds the longest sequence: powers of two, or all ranks."""
    ranks, longest = case.topology.ranks, case.lengths.max(initial=0)
    found = [1 << i for i in range(ranks.bit_length()) if ranks % (1 << i) == 0]
    return [size for size in dict.fromkeys([*found, ranks]) if longest / size <= case.room] or [
        ranks
    ]


def packed(case: Case, size: int) -> tuple[Array, float]:
    """Sequences over groups of one size: longest first, to the group with the least work.

    Returns:
        int64 (N,), each sequence's group; and the seconds that the busiest group computes.
    """
    groups = case.topology.ranks // size
    work = (case.attention_seconds() + case.linear_seconds(case.lengths)) / size
    load, group = np.zeros(groups), np.zeros(len(work), np.int64)
    for i in np.argsort(-work, kind="stable").tolist():
        group[i] = load.argmin()
        load[group[i]] += work[i]
    return group, float(load.max())


def best(case: Case, allowed: Callable[[str], bool] = lambda _: True) -> Outcome:
    """The quickest step with groups of equal size, over sizes and forms.

    Args:
        allowed: whether a form is considered, by its name.
    """
    found: Outcome | None = None
    bound = lower_bound(case)
    tried = [
        (_floor(case, group, size, shape), size, group, how, shape)
        for size, group, _ in _by_size(case)
        for how, shape in forms(size, case.topology, case.model.heads)
        if size == 1 or allowed(how)
    ]
    # The likeliest first; of those within a hundredth the smaller groups, quicker to price, too.
    for floor, size, group, how, shape in sorted(
        tried, key=lambda each: (round(each[0] / bound, 2), each[1])
    ):
        limit = np.inf if found is None else found.seconds
        if floor < 0.999 * limit:
            if len(case.lengths) * size > _MOST_PIECES:
                outcome = _by_floor(case, floor, size, shape)
            else:
                outcome = shared(case, group, size, shape, limit)
            if found is None or outcome.seconds < found.seconds:
                found = replace(outcome, form=f"{case.topology.ranks // size} × {size}, {how}")
    if found is None:  # none of the sizes that memory allows has such a form
        ranks = case.topology.ranks
        return shared(case, 0 * case.lengths, ranks, (1, ranks, 1))
    return found


def _by_size(case: Case) -> list[tuple[int, Array, float]]:
    """Sizes of groups, the likeliest first: how sequences are packed, and the busiest's seconds."""
    placed = [(size, *packed(case, size)) for size in sizes(case)]
    bound = lower_bound(case)
    return sorted(placed, key=lambda each: (round(each[2] / bound, 2), each[0]))


def _floor(case: Case, group: Array, size: int, shape: Grid) -> float:
    """Seconds that no step in a form is shorter than: its work, or the transfers of one group.

    Sequences that are cut into chunks fill the last tile of each badly. Of transfers latencies and
    copies of key heads are left out.
    """
    costs, full, each = case.costs(), case.model.full_layers, case.topology.ranks_per_node
    (rows, seats, slices), groups = shape, case.topology.ranks // size
    chunks = 1 if rows * seats == 1 else 2 * rows * seats
    tiles = chunks * np.ceil(case.lengths / chunks / costs.tile)
    pairs = costs.tile**2 * tiles * (tiles + 1) / 2
    linear = case.linear_seconds(case.lengths)
    work = np.bincount(group, BOTH * full * costs.pair * pairs + linear, groups).max() / size
    tokens = float(np.bincount(group, case.lengths, groups).max()) / size  # of a rank
    block = tokens * costs.kv_bytes  # of a seat, one slice
    if rows == 1 and size > each:
        hop = block * max(1 / costs.nic, min(slices, each) / costs.between)
    else:
        hop = block / costs.inside
    travel = rows * (seats - 1) * hop
    if rows > 1:
        travel = max(travel, (rows - 1) * min(seats * slices, each) * block / costs.between)
    near, far = min(slices, each) - 1, max(0, slices - each)
    move = max(near / slices / costs.inside, far / slices * each / costs.between)
    moves = 2 * tokens * (2 * costs.q_bytes + costs.kv_bytes) * move
    held = float(case.linear_seconds(tokens))
    return max(float(work), held + full * RING_TRAFFIC.sum() * travel) + full * moves


def _by_floor(case: Case, floor: float, size: int, shape: Grid) -> Outcome:
    """A step of so many pieces that to lay them out takes minutes: as long as its floor, which is
    in its favour, with the bytes of equal blocks."""
    costs, full, each = case.costs(), case.model.full_layers, case.topology.ranks_per_node
    (rows, seats, slices), tokens = shape, float(case.lengths.sum())
    blocks = RING_TRAFFIC.sum() * full * tokens * costs.kv_bytes
    between = blocks * max(0, size // each - 1)
    moves = 2 * full * tokens * (2 * costs.q_bytes + costs.kv_bytes) * (slices - 1) / slices
    inside = max(0.0, blocks * (rows * seats - 1) - between) + moves
    busy = np.full(case.topology.ranks, lower_bound(case))
    return Outcome(
        max(floor, case.zero_seconds), busy, inside, between, case.memory(case.share, case.share)
    )


def shared(case: Case, group: Array, size: int, shape: Grid, limit: float = np.inf) -> Outcome:
    """A step in which each group of `size` ranks attends to its sequences in one form.

    Args:
        limit: seconds beyond which a step is of no interest; its linear layers are not priced then.
    """
    topology = case.topology
    starts = np.arange(0, topology.ranks, size)
    if size == 1:
        owners = Owners(group, [], "rank")
    else:
        grids = [np.arange(first, first + size).reshape(shape) for first in starts.tolist()]
        owners = Owners(-1 - group, grids, "rank")
    return of_plan(case, build("groups", case.lengths, owners, topology, by_node=False), limit)


def of_plan(case: Case, made: Plan, limit: float = np.inf) -> Outcome:
    """A step of a plan in which tokens stay where attention has them in all layers."""
    model, costs = case.model, replace(case.costs(), to_qkv=0.0, from_o=0.0)
    layer = price(made, costs)
    left = (limit - max(1, model.full_layers) * layer.seconds) / max(1, model.linear_layers)
    priced = model.linear_layers and left > 0
    linear, passed = linear_layer(made, costs, left) if priced else (0.0, None)
    sent = layer.traffic * model.full_layers
    if passed is not None:
        sent += passed * model.linear_layers
    tokens = made.stream.tokens
    # A rank computes its sequences in micro-batches as large as its memory allows.
    share = case.lengths.astype(np.float64)
    for ring in made.rings:
        share[ring.sequences] /= ring.members.size
    held = max(min(case.room, float(tokens.max())), float(share.max()))
    return Outcome(
        max(
            float(max(1, model.full_layers) * layer.seconds + model.linear_layers * linear),
            case.zero_seconds,
        ),
        model.full_layers * layer.arithmetic.sum(axis=0) + case.linear_seconds(tokens),
        float(sent.inside.sum()),
        float(sent.between.sum()),
        case.memory(held, held),
    )


def linear_layer(made: Plan, costs: Costs, limit: float = np.inf) -> tuple[float, Traffic | None]:
    """Seconds and traffic of one linear layer besides its work: of states or of all-to-alls.

    If either takes `limit` seconds at least, so many seconds and no traffic may be returned.
    """
    assert costs.states is not None
    heads = exchanged_heads(made, costs)
    passes = pass_seconds(made, costs.states).max(axis=1).sum() if made.crossing else 0.0
    # To price the messages of states takes long: not where the passes alone take longer.
    if heads is not None and passes >= heads[0]:
        return heads
    if min(passes, heads[0] if heads is not None else np.inf) >= limit:
        return limit, None
    states = price_states(made, costs)
    return min(states, heads, key=lambda way: way[0]) if heads else states


def exchanged_heads(made: Plan, costs: Costs) -> tuple[float, Traffic] | None:
    """Seconds and traffic of exchanging heads for tokens around one linear layer, and back.

    q, k, v and o of as many heads as a state has, forward and backward; None if the ranks of a ring
    do not divide the heads.
    """
    assert costs.states is not None
    ranks, each = made.topology.ranks, made.topology.ranks_per_node
    traffic = Traffic(np.zeros(ranks), np.zeros(ranks))
    late = np.zeros(ranks)
    for ring in made.rings:
        members = ring.members
        if costs.states.heads % len(members):
            return None
        width = costs.q_bytes / costs.heads * costs.states.heads
        sent = 2 * 4 * width * float(ring.tokens.sum()) / len(members) ** 2  # to each member
        on_node = np.bincount(members // each)
        near = on_node[members // each] - 1
        far = len(members) - 1 - near
        traffic.inside[members] += near * sent
        traffic.between[members] += far * sent
        rate = costs.between / each
        seconds = np.maximum(near * sent / costs.inside, far * sent / rate)
        late[members] += seconds.max() + 4 * (
            costs.latency_between if far.any() else costs.latency_inside
        )
    return float(late.max()), traffic


def by_time(case: Case, form: str) -> Outcome:
    """The quickest of several steps with groups of unequal size, one for each sequence.

    A sequence takes the fewest ranks (a power of two, or all) that hold it and on which it takes no
    longer than a multiple of the even share of all work; the longest first, on the group that is
    free first. Tried are several multiples, and memory alone.

    Args:
        form: of full attention: "ring" or "all-to-all".
    """
    even = lower_bound(case)
    every = [_fewest(case, limit * even, form) for limit in (0.5, 0.75, 1.0, 1.25, 1.6, np.inf)]
    distinct = {each.tobytes(): each for each in every}.values()
    return min((_sized(case, each, form) for each in distinct), key=lambda outcome: outcome.seconds)


def _fewest(case: Case, limit: float, form: str) -> Array:
    """int64 (N,): the fewest ranks for each sequence, by memory and by a limit of seconds."""
    ranks = case.topology.ranks
    most = min(ranks, case.model.heads) if form == "all-to-all" else ranks
    work = case.attention_seconds() + case.linear_seconds(case.lengths)
    size = np.ones(len(case.lengths), np.int64)
    while True:
        short = (case.lengths / size > case.room) | ((work / size > limit) & (size < most))
        short &= size < ranks
        if not short.any():
            return size
        size = np.where(short, np.minimum(2 * size, ranks), size)


def _sized(case: Case, sizes: Array, form: str) -> Outcome:
    """A step in which each sequence has a group of its size: the longest first, on the group that
    is free first."""
    topology, ranks = case.topology, case.topology.ranks
    ready = np.zeros(ranks)
    owner = np.zeros(len(case.lengths), np.int64)
    rings: dict[tuple[int, int], int] = {}
    work = (case.attention_seconds() + case.linear_seconds(case.lengths)) / sizes
    for i in np.argsort(-case.lengths, kind="stable").tolist():
        size = int(sizes[i])
        if size == 1:
            owner[i] = first = int(ready.argmin())
            ready[first] += work[i]
            continue
        free = ready[: ranks // size * size].reshape(-1, size).max(axis=1)
        first = int(free.argmin()) * size
        ready[first : first + size] = free.min() + work[i]
        owner[i] = -1 - rings.setdefault((first, size), len(rings))
    grids = []
    for first, size in rings:
        whole = form == "all-to-all" and size <= case.model.heads
        shape = (1, 1, size) if whole else _ring(size, topology)
        grids.append(np.arange(first, first + size).reshape(shape))
    made = build("sized", case.lengths, Owners(owner, grids, "rank"), topology, by_node=False)
    return of_plan(case, made)


def _ring(size: int, topology: Topology) -> Grid:
    each = topology.ranks_per_node
    return (size // each, each, 1) if size > each and size % each == 0 else (1, size, 1)


def gathered(case: Case) -> Outcome:
    """The quickest step in which each group gathers all keys and values of its sequences.

    A group's ranks share each sequence in 2G chunks (per document), or all its sequences end to end
    (per sequence), whichever takes less: WLB-LLM (arXiv 2503.17924) chooses so at every batch. The
    gather overlaps nothing.
    """
    found: Outcome | None = None
    for size, group, least in _by_size(case):
        limit = np.inf if found is None else found.seconds
        if least < 0.999 * limit:
            if size == 1:
                outcome = shared(case, group, 1, (1, 1, 1), limit)
            else:
                outcome = _gathered(case, group, size, limit=limit)
            if found is None or outcome.seconds < found.seconds:
                found = replace(outcome, form=f"{case.topology.ranks // size} × {size}")
    assert found is not None
    return found


def in_order(case: Case, size: int) -> Outcome:
    """A step in which groups of `size` ranks gather keys, with equal windows of the batch in its
    order, each cut per sequence: what WLB-LLM is compared with."""
    ends = np.cumsum(case.lengths)
    window = float(ends[-1]) * size / case.topology.ranks
    group = np.minimum((ends - case.lengths) // window, case.topology.ranks // size - 1)
    return _gathered(case, group.astype(np.int64), size, per_document=False)


def _gathered(
    case: Case, group: Array, size: int, per_document: bool = True, limit: float = np.inf
) -> Outcome:
    topology, model, costs = case.topology, case.model, case.costs()
    full, each = model.full_layers, topology.ranks_per_node
    groups = topology.ranks // size
    # Forward seconds of each rank, cut per document and per sequence.
    by_document, by_sequence = np.zeros((groups, size)), np.zeros((groups, size))
    tokens = np.bincount(group, case.lengths, groups)
    for g in range(groups):
        lengths = case.lengths[group == g]
        if not len(lengths):
            continue
        edges = np.arange(2 * size + 1) * lengths[:, None] // (2 * size)
        by_document[g] = _folded(costs.attention(edges[:, :-1], edges[:, 1:]).sum(axis=0))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        bounds = np.arange(2 * size + 1) * int(ends[-1]) // (2 * size)
        cuts = np.union1d(bounds, ends)
        begin = ends[np.searchsorted(ends, cuts[:-1], side="right") - 1]
        chunk = np.searchsorted(bounds, cuts[:-1], side="right") - 1
        spans = costs.attention(cuts[:-1] - begin, cuts[1:] - begin)
        by_sequence[g] = _folded(np.bincount(chunk, spans, 2 * size))
    keys = tokens * costs.kv_bytes  # of each group
    far = max(0, size - each) / size  # enters each node once, over all its NICs
    travel = keys * max((size - 1) / size / costs.inside, far / costs.between)
    travel = travel + _latency(costs, size, each)
    if not per_document:
        by_document[:] = np.inf
    quicker = by_document.max(axis=1) < by_sequence.max(axis=1)
    work = np.where(quicker[:, None], by_document, by_sequence)
    seconds = full * (BOTH * work.max(axis=1) + 3 * travel)
    seconds = seconds + case.linear_seconds(tokens / size)
    extra, passed = 0.0, None
    if model.linear_layers and seconds.max() < limit:
        owners = Owners(-1 - group, [_ranks(g, size) for g in range(groups)], "rank")
        made = build("gathered", case.lengths, owners, topology, by_node=False)
        left = (limit - float(seconds.max())) / model.linear_layers
        extra, passed = linear_layer(made, costs, left)
    sent = 3 * full * float(keys.sum()) * (size - 1)
    away = 3 * full * float(keys.sum()) * max(0, size // each - 1)
    busy = full * BOTH * work + np.asarray(case.linear_seconds(tokens / size))[:, None]
    held = max(float(case.lengths.max()) / size, min(case.room, float(tokens.max()) / size))
    return Outcome(
        max(float(seconds.max()) + model.linear_layers * extra, case.zero_seconds),
        busy.reshape(-1),
        sent - away + (model.linear_layers * float(passed.inside.sum()) if passed else 0.0),
        away + (model.linear_layers * float(passed.between.sum()) if passed else 0.0),
        case.memory(held, held, float(keys.max())),
    )


def _folded(chunks: Array) -> Array:
    """(2G,) -> (G,): rank i has chunks i and 2G − 1 − i."""
    half = len(chunks) // 2
    return chunks[:half] + chunks[: half - 1 : -1]


def _ranks(group: int, size: int) -> Array:
    return np.arange(group * size, (group + 1) * size).reshape(1, size, 1)


def _latency(costs: Costs, size: int, each: int) -> float:
    """Seconds before the first byte arrives, in an exchange of so many adjacent ranks."""
    return costs.latency_between if size > each else costs.latency_inside
