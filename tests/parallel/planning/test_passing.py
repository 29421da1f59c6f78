"""Messages bring each fragment the state that enters it, and few of them cross between nodes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from parallel.planning.layout import Topology
from parallel.planning.passing import Message, Passing, least_heads


@st.composite
def passings(draw: st.DrawFn) -> tuple[Passing, Topology, int]:
    topology = Topology(draw(st.integers(2, 13)), draw(st.integers(1, 5)))
    rank = st.integers(0, topology.ranks - 1)
    holders = draw(st.lists(rank, min_size=2, max_size=12))
    heads = draw(st.integers(1, 9))
    least = draw(st.integers(1, 10))
    return Passing(holders, heads, topology, least), topology, heads


def heads_by(messages: list[Message], *fields: str) -> Counter:
    """How many messages carry each head of an item, counted by these fields of the messages."""
    return Counter(
        (*(getattr(m, field) for field in fields), head)
        for m in messages
        for head in range(*m.heads)
    )


@given(passings())
def test_all_fragments_but_the_last_send_their_map_and_all_but_the_first_get_a_state(
    case: tuple[Passing, Topology, int],
) -> None:
    passing, _, heads = case
    maps, _, _, states = passing.turns()
    given_, told = heads_by(maps, "source", "item"), heads_by(states, "target", "item")
    for found, kind, numbers in (
        (given_, "fragment", range(passing.last)),
        (told, "state", range(1, passing.last + 1)),
    ):
        wanted = [(passing.holders[n], (kind, n), head) for n in numbers for head in range(heads)]
        assert found == Counter(wanted)


@given(passings())
def test_between_nodes_go_one_map_and_one_state_a_run(
    case: tuple[Passing, Topology, int],
) -> None:
    passing, topology, heads = case
    inside, runs, entries, also_inside = passing.turns()
    each = topology.ranks_per_node
    assert all(m.source // each == m.target // each for m in (*inside, *also_inside))
    others = len(passing.runs) - 1
    for turn, numbers in ((runs, range(others)), (entries, range(1, others + 1))):
        assert set(heads_by(turn, "item").values()) <= {1}
        assert len(heads_by(turn, "item")) == heads * others
        assert {m.item[1] for m in turn} == (set(numbers) if others else set())


@given(passings())
def test_a_rank_composes_only_what_it_has_received(case: tuple[Passing, Topology, int]) -> None:
    """A rank that sends a run's map or a state has received all that these are composed of."""
    passing, _, _ = case
    maps, runs, entries, states = passing.turns()
    came = heads_by(maps, "target", "item")
    for m in runs:
        for place in passing.runs[m.item[1]]:
            assert all(came[m.source, ("fragment", place), head] for head in range(*m.heads))
    came += heads_by(runs, "target", "item")
    for m in entries:
        for number in range(m.item[1]):
            assert all(came[m.source, ("run", number), head] for head in range(*m.heads))
    came += heads_by(entries, "target", "item")
    for m in states:
        number = next(r for r, run in enumerate(passing.runs) if m.item[1] in run)
        before = [("fragment", n) for n in passing.runs[number] if n < m.item[1]]
        before += [("entry", number)] if number else []
        assert all(came[m.source, item, head] for item in before for head in range(*m.heads))


def test_first_fragments_and_runs_send_their_state_alone() -> None:
    for holders in ([0, 1], [0, 1, 2, 3, 1], [3, 0, 1]):
        turns = Passing(holders, 4, Topology(4, 2)).turns()
        for turn, kind in zip(turns, ("fragment", "run", "entry", "state"), strict=True):
            assert all(m.whole == (m.item[1] > 0 and kind in ("fragment", "run")) for m in turn)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(2, 9))
def test_no_rank_composes_fewer_heads_than_a_message_is_worth(
    heads: int, least: int, ranks: int
) -> None:
    passing = Passing(list(range(ranks)), heads, Topology(ranks, ranks), least)
    (parts,) = passing.parts
    assert parts[0][1][0] == 0
    assert sum(b - a for _, (a, b) in parts) == heads
    assert min(b - a for _, (a, b) in parts) >= min(least, heads)
    assert len(parts) == min(ranks - 1, max(1, heads // least))


def test_a_message_of_states_is_not_smaller_than_its_latency_is_worth() -> None:
    assert least_heads(4.0 * (128 * 128 + 128 * 128)) == 1
    assert least_heads(4.0 * (64 * 64 + 64 * 64)) == 2
    assert least_heads(8.0) == 8192  # of the diagonal scan, whose heads are channels
    assert least_heads(0.0) >= 1
