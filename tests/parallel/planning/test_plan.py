"""A plan places every token once in each layout, and moves and rings agree with the layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.planning.cost import price
from parallel.planning.costs import Costs
from parallel.planning.heads import split
from parallel.planning.layout import Layout, Plan, Topology
from parallel.planning.owners import Owners
from parallel.planning.plan import Strategy, plan

STRATEGIES = ("balanced", "ring", "even", "allgather")
batches = st.lists(
    st.one_of(st.integers(0, 4), st.integers(0, 60), st.integers(0, 900)), max_size=24
)
topologies = st.builds(Topology, st.integers(1, 13), st.integers(1, 9))


@st.composite
def irregular(draw: st.DrawFn) -> Topology:
    """Nodes that miss ranks, and ranks of different speeds."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    speeds = tuple(draw(st.sampled_from([0.5, 0.9, 1.0])) for _ in range(sum(sizes)))
    return Topology(sum(sizes), max(sizes), sizes, speeds)


any_heads = st.sampled_from([(1, 1), (4, 4), (8, 2), (5, 1), (32, 8), (24, 24)])
any_rest = st.sampled_from([0.0, 1e-8, 1e-6])
any_costs = st.builds(
    lambda heads, rest: Costs(heads=heads[0], kv_heads=heads[1], rest=rest), any_heads, any_rest
)
any_plan = st.builds(
    plan,
    batches,
    st.one_of(topologies, irregular()),
    st.sampled_from(STRATEGIES),
    any_costs,
    slack=st.sampled_from([0.0, 0.15, 1.0]),
    by_node=st.booleans(),
    routing=st.booleans(),
)
quick = settings(max_examples=60, deadline=None)


Place = tuple[int, int]  # rank, offset


def owners_of_tokens(layout: Layout, cu_seqlens: np.ndarray) -> list[dict[int, Place]]:
    """The rank that holds each slice of each token of the stream; fails if two ranks hold one."""
    found: dict[int, dict[int, Place]] = {}
    of: dict[int, int] = {}
    columns = (layout.sequence, layout.start, layout.end, layout.rank, layout.offset)
    columns += (layout.piece, layout.slices)
    for sequence, start, end, rank, offset, piece, pieces in zip(*columns, strict=True):
        for i in range(end - start):
            token = int(cu_seqlens[sequence]) + int(start) + i
            assert piece not in found.setdefault(token, {})
            found[token][int(piece)] = int(rank), int(offset) + i
            assert of.setdefault(token, int(pieces)) == pieces
    assert sorted(found) == list(range(int(cu_seqlens[-1])))
    assert all(sorted(held) == list(range(of[token])) for token, held in found.items())
    return [found[token] for token in range(len(found))]


@quick
@given(any_plan)
def test_every_token_is_owned_once_in_each_layout(made: Plan) -> None:
    for layout in (made.stream, made.attention):
        every = owners_of_tokens(layout, made.cu_seqlens)
        places = [place for held in every for place in held.values()]
        assert len(set(places)) == len(places)
        counts = np.bincount([rank for rank, _ in places], minlength=made.topology.ranks)
        assert (counts == layout.tokens).all()
        assert all(offset < layout.tokens[rank] for rank, offset in places)
        assert (layout.end > layout.start).all()
    assert (made.stream.slices == 1).all()


@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_slices_cover_every_head_once(kv_heads: int, ratio: int, data: st.DataObject) -> None:
    """Each slice has the key heads of its query heads, in the ratio of the whole layer."""
    heads = kv_heads * ratio
    slices = data.draw(st.integers(1, heads))
    every = split(heads, kv_heads, slices)
    assert len(every) == slices
    assert [h for (a, b), _ in every for h in range(a, b)] == list(range(heads))
    for (a, b), (first, end) in every:
        wanted = {h // ratio for h in range(a, b)}
        assert wanted == set(range(first, end))
        assert (b - a) % (end - first) == 0
    sizes = [b - a for (a, b), _ in every]
    if heads % slices == 0 and (kv_heads % slices == 0 or slices % kv_heads == 0):
        assert max(sizes) == min(sizes)


@quick
@given(any_plan)
def test_fragments_that_continue_a_sequence_come_first(made: Plan) -> None:
    """Adjoining runs of a sequence on one rank are one fragment."""
    for rank in range(made.topology.ranks):
        rows = made.stream.rows(rank)
        begins = (made.stream.start[rows] == 0).tolist()
        assert begins == sorted(begins)
    for fragments in made.fragments:
        assert made.stream.start[fragments[0]] == 0
        assert (made.stream.start[fragments[1:]] == made.stream.end[fragments[:-1]]).all()
        assert (np.diff(made.stream.rank[fragments]) != 0).all()


@quick
@given(batches, topologies, any_costs)
@example([65], Topology(8, 6), Costs(heads=4, kv_heads=4))  # slices lie over a smaller last node
def test_tokens_leave_a_node_only_if_it_holds_more_than_its_shards(
    lengths: list[int], where: Topology, costs: Costs
) -> None:
    """For rings whose seats are on one node; if slices are on several, tokens must cross."""
    made = plan(lengths, where, costs=costs)
    if any(np.ptp(where.node(ring.ranks), axis=2).any() for ring in made.rings):
        return
    moves, node = made.to_attention, np.arange(where.ranks) // where.ranks_per_node
    held = np.bincount(node, np.round(made.attention.load).astype(int))
    share = np.bincount(node, made.stream.tokens)
    away = node[moves.source] != node[moves.target]
    left = np.bincount(node[moves.target[away]], (moves.tokens / moves.slices)[away], where.nodes)
    assert (left <= np.maximum(held - share, 0) + where.ranks).all()


@quick
@given(any_plan)
def test_moves_carry_each_token_from_its_old_place_to_its_new(made: Plan) -> None:
    """Buffers of token numbers, moved row by row, hold what the other layout says."""
    moves = made.to_attention
    before = [np.full(n, -1) for n in made.stream.tokens]
    for token, held in enumerate(owners_of_tokens(made.stream, made.cu_seqlens)):
        rank, offset = held[0]
        before[rank][offset] = token
    after = [np.full((n, 2), -1) for n in made.attention.tokens]
    for row in range(len(moves.tokens)):
        a, b, n = moves.source_offset[row], moves.target_offset[row], moves.tokens[row]
        target = after[moves.target[row]][b : b + n]
        assert (target == -1).all()
        target[:, 0] = before[moves.source[row]][a : a + n]
        target[:, 1] = moves.piece[row]
    for token, held in enumerate(owners_of_tokens(made.attention, made.cu_seqlens)):
        for piece, (rank, offset) in held.items():
            assert after[rank][offset].tolist() == [token, piece]


@quick
@given(any_plan)
def test_sender_and_receiver_agree_on_the_order_of_rows(made: Plan) -> None:
    moves = made.to_attention
    for rank in range(made.topology.ranks):
        for peer in range(made.topology.ranks):
            sent = [row for row in moves.sent(rank) if moves.target[row] == peer]
            received = [row for row in moves.received(peer) if moves.source[row] == rank]
            assert sent == received


@quick
@given(batches, topologies, st.sampled_from(STRATEGIES), st.booleans())
def test_the_same_batch_gives_the_same_plan(
    lengths: list[int], where: Topology, how: Strategy, by_node: bool
) -> None:
    first = plan(lengths, where, how, by_node=by_node)
    again = plan(np.array(lengths, dtype=np.int32), where, how, by_node=by_node)
    for one, two in ((first.stream, again.stream), (first.attention, again.attention)):
        for name in ("sequence", "start", "end", "rank", "offset", "tokens"):
            assert (getattr(one, name) == getattr(two, name)).all()
    assert [r.ranks.tolist() for r in first.rings] == [r.ranks.tolist() for r in again.rings]


@quick
@given(any_plan)
def test_rings_are_zigzag_blocks_of_their_members_buffers(made: Plan) -> None:
    """Member i holds chunks i and 2G − 1 − i: early chunks of all sequences, then late ones."""
    places = owners_of_tokens(made.attention, made.cu_seqlens)
    for ring in made.rings:
        size = ring.seats
        assert len(set(ring.members.tolist())) == ring.members.size == size * ring.slices
        lengths = np.diff(made.cu_seqlens)[ring.sequences]
        assert (ring.chunks[:, 0] == 0).all()
        assert (ring.chunks[:, -1] == lengths).all()
        sizes = np.diff(ring.chunks, axis=1)
        assert sizes.min() >= 0
        if size > 1:
            assert (sizes.max(axis=1) - sizes.min(axis=1) <= 1).all()
        for member, rank in enumerate(ring.members):
            wanted = int(ring.offset[member])
            seat, piece = divmod(member, ring.slices)
            for chunk in (seat, 2 * size - 1 - seat):
                for s, sequence in enumerate(ring.sequences):
                    begin = int(made.cu_seqlens[sequence])
                    for position in range(ring.chunks[s, chunk], ring.chunks[s, chunk + 1]):
                        assert places[begin + position][piece] == (rank, wanted)
                        wanted += 1
            assert wanted - ring.offset[member] == ring.tokens[seat]


@quick
@given(any_plan)
def test_a_rank_holds_its_rings_and_then_whole_sequences(made: Plan) -> None:
    if made.strategy == "allgather":
        return
    lengths = np.diff(made.cu_seqlens)
    for rank in range(made.topology.ranks):
        at = 0
        for ring, member in made.rings_of(rank):
            assert ring.offset[member] == at
            at += int(ring.tokens[member // ring.slices])
        rows = made.whole(rank)
        assert (made.attention.start[rows] == 0).all()
        assert (made.attention.end[rows] == lengths[made.attention.sequence[rows]]).all()
        whole = (made.attention.end - made.attention.start)[rows].sum()
        assert at + whole == made.attention.tokens[rank]


@pytest.mark.parametrize(("nodes", "each"), [(1, 1), (1, 5), (2, 1), (2, 4), (3, 2)])
def test_rounds_bring_every_block_to_every_member_once(nodes: int, each: int) -> None:
    """Followed round by round: a seat sends only a block that it has had since round `ready`."""
    size = nodes * each
    made = plan([size * 20], Topology(size, each), "even")
    held = [{member: 0} for member in range(size)]
    for number, step in enumerate(made.rings[0].rounds()):
        for member in range(size):
            block, source = int(step.block[member]), int(step.source[member])
            if number == 0:
                assert (block, source) == (member, member)
                continue
            assert held[source][block] <= step.ready < number
            assert block not in held[member]
            held[member][block] = number
            assert source // each == member // each or number % each == 0
    assert all(sorted(blocks) == list(range(size)) for blocks in held)


@quick
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=40),
    topologies,
    st.sampled_from([0.15, 0.5]),
    any_costs,
)
def test_balanced_keeps_tokens_within_the_slack(
    lengths: list[int], where: Topology, slack: float, costs: Costs
) -> None:
    """Rounding of chunks: two tokens a ring and sequence. One of h slices counts 1/h."""
    made = plan(lengths, where, costs=costs, slack=slack)
    room = np.ceil((1 + slack) * sum(lengths) / where.ranks)
    for rank in range(where.ranks):
        rounding = sum(2 * len(ring.sequences) for ring, _ in made.rings_of(rank))
        assert made.attention.load[rank] <= room + rounding


def pairs(made: Plan) -> np.ndarray:
    """Query-key pairs of each rank, counted position by position; all heads are one pair."""
    found = np.zeros(made.topology.ranks)
    layout = made.attention
    for start, end, rank, slices in zip(
        layout.start, layout.end, layout.rank, layout.slices, strict=True
    ):
        found[rank] += sum(range(start + 1, end + 1)) / slices
    return found


def test_short_sequences_stay_whole_and_on_their_node() -> None:
    made = plan([256] * 64, Topology(8, 4))
    assert not made.rings
    assert (made.to_attention.source // 4 == made.to_attention.target // 4).all()
    assert all(len(rows) == 1 for rows in made.fragments)


def test_no_sequence_is_cut_where_another_order_cuts_none() -> None:
    """Sequences of a shard and of half a shard, in an order that cuts some of them."""
    made = plan([500, 1000, 500, 1000, 500, 1000, 500, 1000], Topology(6, 6))
    assert all(len(rows) == 1 for rows in made.fragments)


def test_a_long_sequence_goes_over_nodes_and_work_is_even() -> None:
    made = plan([60000, *[500] * 8], Topology(16, 8))
    assert made.rings[0].ranks.shape == (2, 8, 1)
    work = pairs(made)
    assert work.max() < 1.05 * work.mean()


def test_a_middle_sequence_stays_inside_one_node() -> None:
    made = plan([6000, *[1000] * 58], Topology(16, 8))
    for ring in made.rings:
        assert ring.ranks.shape[0] == 1


def test_tokens_that_stay_on_their_rank_move_less() -> None:
    lengths = [30000, 9000, 8000, 5000, 4000, 3000, 2500, 2000, 1500, 536]
    near, far = (plan(lengths, Topology(16, 8), by_node=by_node) for by_node in (False, True))
    moved = [
        made.to_attention.tokens[made.to_attention.source != made.to_attention.target].sum()
        for made in (near, far)
    ]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("by_node", [False, True])
def test_a_sequence_whose_heads_are_split_lies_in_one_run_on_most_ranks(by_node: bool) -> None:
    """Each run of it on a rank is a fragment, for which a state has to pass."""
    made = plan([60000], Topology(16, 8), "balanced", Costs(heads=16, kv_heads=16), 0.15, by_node)
    (ring,) = made.rings
    assert ring.slices > 1
    runs = np.bincount(made.stream.rank, minlength=16)
    assert runs.tolist() == [1] * 16


def test_placings_that_differ_only_in_slices_are_different() -> None:
    ring, ulysses = (
        Owners(np.array([-1]), [np.arange(8).reshape(shape)]) for shape in ((1, 8, 1), (1, 1, 8))
    )
    assert ring.key != ulysses.key


@pytest.mark.parametrize("by_node", [False, True])
def test_routing_takes_all_ranks_of_a_node(by_node: bool) -> None:
    """For a ring over two nodes, and for a node that takes tokens from another."""
    lengths = [100000, 7000, *[500] * 30]
    routed, direct = (
        price(plan(lengths, Topology(16, 8), by_node=by_node, routing=on), Costs()).traffic.between
        for on in (True, False)
    )
    assert routed.max() < 2 * routed.mean()
    assert direct.max() > 6 * direct.mean()


@pytest.mark.parametrize("strategy", ["even", "ring"])
def test_without_routing_a_ring_steps_from_rank_to_rank(strategy: Strategy) -> None:
    lengths = [100000, 7000, *[500] * 30]
    nodes = [
        max(len(ring.ranks) for ring in plan(lengths, Topology(16, 8), strategy, routing=on).rings)
        for on in (True, False)
    ]
    assert nodes[0] > nodes[1] == 1


def test_wrong_arguments_are_refused_by_value() -> None:
    with pytest.raises(ValueError, match="-3 at 1"):
        plan([4, -3], Topology(2, 2))
    with pytest.raises(ValueError, match=r"'rings'.*balanced, ring"):
        plan([4], Topology(2, 2), "rings")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 ranks"):
        Topology(0, 1)
