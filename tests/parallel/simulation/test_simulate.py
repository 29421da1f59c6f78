"""The simulator's prices are consistent, and equal a count by hand where that is possible."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.__main__ import main
from parallel.planning import plan as planning
from parallel.planning.building import build
from parallel.planning.clusters import clusters, load_cluster
from parallel.planning.cost import price
from parallel.planning.costs import Costs
from parallel.planning.heads import split
from parallel.planning.layout import Plan, Topology
from parallel.planning.owners import on_all_ranks
from parallel.planning.plan import Strategy, plan
from parallel.planning.states import price_states
from parallel.simulation import simulate
from parallel.simulation.models import MODELS, load_model
from parallel.simulation.strategies import (
    Case,
    headrace,
    held_to_travel,
    lower_bound,
    our_plan,
    price_plan,
    strategies,
)

lengths_of_a_batch = st.lists(st.integers(1, 20000), min_size=1, max_size=30)
quick = settings(max_examples=15, deadline=None)
EVEN_SHARDS = tuple(limits for limits in planning._LIMITS if not limits.uneven)


def a_case(lengths: list[int], gpus: int = 16, model: str = "hybrid-7b") -> Case:
    topology = Topology(gpus, min(8, gpus))
    return Case(np.array(lengths), topology, load_cluster("a800"), MODELS[model])


@quick
@given(lengths_of_a_batch, st.sampled_from([1, 4, 16]), st.sampled_from(["llama-7b", "hybrid-7b"]))
def test_the_lower_bound_is_below_every_strategy(lengths: list[int], gpus: int, model: str) -> None:
    case = a_case(lengths, gpus, model)
    for name, strategy in strategies(case.model).items():
        outcome = strategy(case)
        assert outcome.seconds >= 0.999 * lower_bound(case), name
        assert outcome.busy.max() <= 1.001 * outcome.seconds, name
        assert outcome.inside >= 0, name
        assert outcome.between >= 0, name


@quick
@given(lengths_of_a_batch)
def test_one_gpu_meets_the_bound_and_sends_nothing(lengths: list[int]) -> None:
    case = a_case(lengths, gpus=1)
    for name, strategy in strategies(case.model).items():
        outcome = strategy(case)
        assert (outcome.inside, outcome.between) == (0, 0), name
        if name != "even":  # it cuts sequences all the same
            assert outcome.seconds == pytest.approx(lower_bound(case)), name


def test_where_only_an_even_split_fits_heads_are_split_too() -> None:
    """Four sequences want 17 nodes of 16: all go on all ranks, by heads inside a node.

    Where shards may be uneven, or memory has room for more of attention's tokens, it is less.
    """
    case = a_case([37900, 25349, 22680, 18927], gpus=128)
    made = plan(case.lengths, case.topology, costs=replace(case.costs(), rest=0.0))
    (ring,) = made.rings
    assert len(ring.sequences) == 4
    assert ring.slices > 1
    undivided = build("even", case.lengths, on_all_ranks(4, case.topology), case.topology, True)
    assert price_plan(case, made).seconds < 0.7 * price_plan(case, undivided).seconds
    assert case.slack > 0.15
    assert price_plan(case, our_plan(case)).seconds < 0.96 * price_plan(case, made).seconds


def test_rings_take_rows_of_a_node_if_they_need_less_than_a_node() -> None:
    """Two sequences take 12 GPUs each, of three nodes; whole nodes would be 16 and 8."""
    lengths = np.array([24576, 24576])
    case = Case(lengths, Topology(24, 8), load_cluster("h800"), MODELS["llama-8b-gqa"])
    made, coarse = with_and_without_rows(case)
    assert [ring.ranks.size for ring in made.rings] == [12, 12]
    assert price_plan(case, made).seconds < 0.985 * price_plan(case, coarse).seconds


def test_placings_over_rows_beat_those_over_whole_nodes() -> None:
    """Two long sequences whose heads are best split over two nodes."""
    lengths = [30462, 28038, 6007, 2403, 1724, 1471, 824, 275]
    case = a_case(lengths, 48, "llama-7b")
    made, coarse = with_and_without_rows(case)
    assert price_plan(case, made).seconds < 0.9 * price_plan(case, coarse).seconds


def with_and_without_rows(case: Case) -> tuple[Plan, Plan]:
    whole_nodes = [limits for limits in planning._LIMITS if limits.rows == 1]
    with mock.patch.object(planning, "_LIMITS", whole_nodes):
        coarse = our_plan(case)
    return our_plan(case), coarse


def test_a_model_without_full_attention_has_its_other_work() -> None:
    case = a_case([9000, 4000, 3000], gpus=8, model="hybrid-7b")
    pure = replace(case, model=replace(case.model, full_every=99))
    assert pure.model.full_layers == 0
    made = our_plan(pure)
    assert made.stream.tokens.tolist() == [2000] * 8
    # Each of the two sequences that have more than a shard is cut, and none twice at one bound.
    assert sum(len(rows) - 1 for rows in made.crossing) <= 7
    states, _ = price_states(made, pure.costs())
    assert headrace(pure).seconds == pytest.approx(
        lower_bound(pure) + pure.model.linear_layers * states
    )


@pytest.mark.parametrize("model", ["hybrid-3b", "llama-7b"])
def test_uneven_shards_make_all_work_even(model: str) -> None:
    """Within memory, what travels left out; every batch gets faster or keeps its plan."""
    given = simulate.Settings("a800", model, "github", 64, 4096, 65536, 2, 0)
    won = []
    for case in simulate.cases(given):
        ours = headrace(case)
        travelling = case.memory(0, 0, held_to_travel(case, our_plan(case)))
        assert 0 < travelling < 0.02
        assert ours.memory < 1.151 + travelling
        with mock.patch.object(planning, "_LIMITS", EVEN_SHARDS):
            won.append(ours.seconds / headrace(case).seconds)
    assert max(won) < 1.002
    assert min(won) < 0.98


def test_heads_are_split_evenly_where_they_are_no_power_of_two() -> None:
    """24 heads over three nodes of eight GPUs, one each."""
    case = a_case([24576], 24, "hybrid-3b")
    made, ways = our_plan(case), Costs.slice_counts
    assert case.model.heads == 24
    assert made.rings[0].slices == 24

    def powers(costs: Costs, each: int) -> list[int]:
        return [h for h in ways(costs, each) if h & (h - 1) == 0]

    with mock.patch.object(Costs, "slice_counts", powers):
        assert price_plan(case, made).seconds < 0.96 * price_plan(case, our_plan(case)).seconds


@pytest.mark.parametrize("model", ["llama-8b-gqa", "hybrid-7b-gqa", "llama-13b"])
def test_no_placing_that_is_tried_is_cheaper(model: str) -> None:
    """By the price of the whole step, with states and copies of keys, in the best waves."""
    (case,) = simulate.cases(simulate.Settings("h800", model, "github", 32, 2048, 65536, 1, 50053))
    step = price_plan(case, our_plan(case)).seconds
    for limits in planning._LIMITS:
        with mock.patch.object(planning, "_LIMITS", (limits,)):
            assert step <= planning._GOOD_ENOUGH * price_plan(case, our_plan(case)).seconds


@pytest.mark.parametrize("gpus", [12, 20, 14])
def test_a_smaller_node_is_used_too(gpus: int) -> None:
    """The last node has four or six GPUs of eight, which no long sequence can do without: it
    crosses to them in rows, and takes about as long as on the full nodes alone."""
    lengths = [2048 * gpus - 3000, 2000, 1000]
    whole = a_case(lengths, gpus // 8 * 8)
    uneven = Case(whole.lengths, Topology(gpus, 8), whole.cluster, whole.model)
    made = our_plan(uneven)
    assert all(ring.ranks[0].size > 1 for ring in made.rings)
    assert price_plan(uneven, made).seconds < 1.15 * price_plan(whole, our_plan(whole)).seconds


@pytest.mark.parametrize("lengths", simulate.distributions())
def test_routing_is_priced(lengths: str) -> None:
    """Without it a hybrid's step is longer, since all traffic between nodes shares a few NICs.

    It gains less where fewer tokens cross: more if shards have to be even.
    """
    given = simulate.Settings("a800", "hybrid-7b", lengths, 64, 4096, 65536, 3, 0)
    batches = simulate.cases(given)
    ways = planning.group_sizes
    even = mock.Mock(return_value=[])  # shards of groups are as attention has them
    for most, tried, groups in ((1.0, planning._LIMITS, ways), (0.98, EVEN_SHARDS, even)):
        with mock.patch.multiple(planning, _LIMITS=tried, group_sizes=groups):
            routed, direct = (
                sum(headrace(replace(case, routing=routing)).seconds for case in batches)
                for routing in (True, False)
            )
        assert routed < most * direct


def test_routing_is_our_plans_alone() -> None:
    case = a_case([9000, 4000, 2000, 1000, 384], model="llama-7b")
    for name, step in strategies(case.model).items():
        if name != "headrace":
            assert step(case).seconds == step(replace(case, routing=False)).seconds, name


def test_moves_overlap_projections() -> None:
    """If heads are projected all at once, less of the moves is hidden, or as much."""
    given = simulate.Settings("a800", "llama-7b", "arxiv", 64, 4096, 65536, 2, 0)
    for case in simulate.cases(given):
        made, costs = our_plan(case), case.costs()
        assert made.waves > 1
        beside = price(made, costs)
        alone = price(made, replace(costs, to_qkv=0.0, from_o=0.0))
        assert (beside.exposed <= alone.exposed).all()
        assert beside.exposed.sum() < 0.5 * alone.exposed.sum()
        # All of a wave's moves, or what is left of them beside the other waves' products.
        shown = alone.moved / made.waves - beside.projected * (1 - 1 / made.waves)
        assert beside.exposed[0] >= np.maximum(shown, 0).sum() - 1e-12


def test_the_time_on_free_links_shows_what_the_network_costs() -> None:
    """On a cluster with free links both times are the same."""
    given = simulate.Settings("a800", "hybrid-7b", "arxiv", 64, 4096, 65536, 2, 0)
    batches = simulate.cases(given)
    found = simulate.summarise(batches)
    step = found["strategies"]["headrace"]["step_ms"]
    assert found["lower_bound_ms"] <= found["free_links_ms"] < step
    free = [replace(case, cluster=case.cluster.with_free_links()) for case in batches]
    again = simulate.summarise(free)
    assert again["strategies"]["headrace"]["step_ms"] == again["free_links_ms"]
    assert again["free_links_ms"] == found["free_links_ms"]


def test_slower_networks_never_make_a_step_shorter() -> None:
    case = a_case([40000, 9000, 7000, 5000, 3000, 1000, 500])
    slow = replace(case.cluster, nic_gbit=case.cluster.nic_gbit / 10, inside_gb=30)
    for name, strategy in strategies(case.model).items():
        slower = strategy(replace(case, cluster=slow)).seconds
        assert slower >= 0.999 * strategy(case).seconds, name


def test_faster_gpus_never_make_a_step_longer() -> None:
    case = a_case([40000, 9000, 7000, 5000, 3000, 1000, 500])
    fast = replace(case.cluster, tflops=case.cluster.tflops * 2)
    for name, strategy in strategies(case.model).items():
        assert strategy(replace(case, cluster=fast)).seconds <= 1.05 * strategy(case).seconds, name


def sent_by_hand(made: Plan, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that each rank sends to its node and to others in one layer's forward and backward
    pass, followed round by round: float64 (ranks,) each."""
    ranks, each = made.topology.ranks, made.topology.ranks_per_node
    found = {True: np.zeros(ranks), False: np.zeros(ranks)}
    for ring in made.rings:
        grid = ring.members.reshape(-1, ring.slices)
        for step in ring.rounds()[1:]:
            for seat, members in enumerate(grid):
                amount = ring.tokens[step.block[seat]] * costs.kv_bytes
                parts = held(costs, ring.slices, made.waves, 1)
                for rank, source, part in zip(members, grid[step.source[seat]], parts, strict=True):
                    found[bool(source // each == rank // each)][source] += 3 * amount * part
    moves = made.to_attention
    for row in np.flatnonzero(moves.source != moves.target):
        # There q, k, v and the gradient of o; back o and the gradients of q, k and v.
        piece, pieces = moves.piece[row], int(moves.slices[row])
        amount = 2 * costs.q_bytes * held(costs, pieces, made.waves, 0)[piece]
        amount += costs.kv_bytes * held(costs, pieces, made.waves, 1)[piece]
        ends = [moves.source[row], moves.target[row]]
        near = ends[0] // each == ends[1] // each
        found[bool(near)][ends] += moves.tokens[row] * amount
    return found[True], found[False]


def held(costs: Costs, slices: int, waves: int, which: int) -> list[float]:
    """Each rank's share of all query heads, or of all key heads (`which` is 1), on one seat."""
    heads, kv_heads = costs.heads // waves, costs.kv_heads // waves
    found = np.zeros(slices)
    for wave in range(waves):
        for rank, runs in enumerate(split(heads, kv_heads, slices, wave)):
            found[rank] += runs[which][1] - runs[which][0]
    return (found / (costs.heads, costs.kv_heads)[which]).tolist()


@quick
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    st.builds(Topology, st.integers(1, 12), st.integers(1, 8)),
    st.sampled_from(["balanced", "ring", "even"]),
    st.booleans(),
    st.sampled_from([Costs(), Costs(heads=32, kv_heads=8), Costs(heads=5, kv_heads=5)]),
)
def test_bytes_are_those_of_the_rounds_and_the_moves(
    lengths: list[int], where: Topology, how: Strategy, by_node: bool, costs: Costs
) -> None:
    made = plan(lengths, where, how, costs, by_node=by_node)
    traffic = price(made, costs).traffic
    inside, between = sent_by_hand(made, costs)
    assert traffic.inside == pytest.approx(inside)
    assert traffic.between == pytest.approx(between)


def test_work_of_a_layer_is_that_of_all_pairs_however_it_is_split() -> None:
    """With tiles of one pair, only the pairs count."""
    lengths = np.array([5000, 1200, 700, 64, 1])
    costs = Costs(tile=1)
    everything = costs.pair * (lengths * (lengths + 1) / 2).sum()
    for how in ("balanced", "ring", "even", "allgather"):
        made = plan(lengths, Topology(6, 3), how)
        work = price(made, costs).arithmetic
        assert work[0].sum() == pytest.approx(everything)
        assert work[1].sum() == pytest.approx(2.5 * everything)


def test_a_ring_begins_when_its_last_member_is_free_and_ends_with_its_busiest() -> None:
    """Where bytes take no time; in the backward pass a pair is five products instead of two."""
    free_links = {"inside": 1e30, "between": 1e30, "nic": 1e30}
    costs = replace(Costs(tile=1), latency_inside=0.0, latency_between=0.0, **free_links)
    made = plan([30000, 9000, 5000, 3000, 2000, 1000], Topology(8, 4), "ring")
    free, waited = np.zeros((2, 8)), False
    for timed in price(made, costs).rings:
        members, seats = timed.ring.members, timed.ring.seats
        chunks = [range(a, b) for row in timed.ring.chunks for a, b in pairwise(row.tolist())]
        seconds = [costs.pair * sum(i + 1 for i in chunk) for chunk in chunks]
        # (sequences, 2 · seats): seat i has chunks i and 2 · seats − 1 − i.
        each = np.reshape(seconds, (-1, 2 * seats)).sum(axis=0)
        busiest = (each + each[::-1])[:seats].max()
        waited |= bool(np.ptp(free[:, members]))
        assert timed.start == pytest.approx(free[:, members].max(axis=1))
        assert timed.end - timed.start == pytest.approx([busiest, 2.5 * busiest])
        free[:, members] = timed.end[:, None]
    assert waited


def test_routing_shortens_a_ring_that_steps_between_nodes() -> None:
    """A single ring has one pair of ranks between two nodes, and so uses one of four NICs."""
    made = plan([60000], Topology(16, 8), "even")
    flat = tuple(replace(ring, ranks=ring.ranks.reshape(1, -1, 1)) for ring in made.rings)
    flat_plan = replace(made, rings=flat)
    costs = replace(Costs(), between=85e9, nic=21e9, inside=1e13, pair=1e-15)
    routed, unrouted = (
        price(flat_plan, given).finish.max() for given in (replace(costs, routed=True), costs)
    )
    assert unrouted > 3 * routed


@pytest.mark.parametrize("name", simulate.distributions())
def test_a_batch_has_exactly_its_tokens(name: str) -> None:
    rng = np.random.default_rng(0)
    for tokens in (1, 777, 65536, 1 << 20):
        lengths = simulate.sample(name, tokens, 65536, rng)
        assert lengths.sum() == tokens
        assert lengths.min() >= 1
        assert lengths.max() <= 65536


def test_lengths_of_a_prepared_corpus(tmp_path: Path) -> None:
    np.cumsum([0, 5, 7, 7, 9]).astype(np.int64).tofile(tmp_path / "offsets.bin")
    lengths = simulate.sample(str(tmp_path), 1000, 65536, np.random.default_rng(0))
    assert set(lengths[:-1].tolist()) <= {5, 7, 9}


@pytest.mark.parametrize("name", clusters())
def test_every_cluster_and_model_is_priced(name: str) -> None:
    for model in MODELS:
        given = simulate.Settings(name, model, "github", 16, 2048, 65536, 1, 0)
        summary = simulate.summarise(simulate.cases(given))
        assert set(summary["strategies"]) == set(strategies(MODELS[model]))
        assert ("zeppelin" in summary["strategies"]) == (not MODELS[model].linear_layers)


def test_the_command_prints_json_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "timeline.png"
    command = f"parallel simulate --gpus 16 --batches 1 --json --figure {picture}"
    monkeypatch.setattr("sys.argv", command.split())
    assert main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["strategies"]["headrace"]["step_ms"] >= printed["lower_bound_ms"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--gpus 0", "--gpus is 0"),
        ("--gpus 9999", "--gpus is 9999; it must be at most 4096"),
        ("--cluster b100", "cluster is 'b100'; it must be one of a800, h200, h800, or"),
        ("--model gpt", "model is 'gpt'; it must be one of llama-3b"),
        ("--lengths novels", "lengths is 'novels'; it must be one of arxiv"),
        ("--seed -1", "--seed is -1; it must be at least 0"),
        (f"--tokens-per-gpu {'9' * 30}", "it must be at most 1073741824"),
        (f"--longest {'9' * 30}", "it must be at most 1073741824"),
        ("--batches 99999", "--batches is 99999; it must be at most 10000"),
        ("--tokens-per-gpu 1000000000 --longest 1", "more than 200,000 sequences; lower"),
        ("--figure noend", "--figure is 'noend'; it must be a file whose name ends in one of"),
        ("--figure /", "--figure is '/'; it must be a file whose name ends in one of .png"),
        ("--figure nowhere/x.png", "there is no folder 'nowhere'"),
        (f"--cluster {'x' * 5000}", "it must be one of a800, h200, h800, or"),
        (f"--model {'x' * 5000}", "it must be one of llama-3b"),
        (f"--lengths {'x' * 5000}", "it must be one of arxiv"),
    ],
)
def test_wrong_options_end_with_one_line(
    options: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["parallel", "simulate", *options.split()])
    assert main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfet\x00", "not UTF-8 text"),
        (b"a: [", "cannot be read as YAML"),
        (b"a: !!python/object:os.system x", "cannot be read as YAML"),
        (b"a: 2026-13-45", "cannot be read as YAML"),
        (b"[" * 5000, "nested too deep"),
        (b"# x\n" * 300_000, "characters are more than 1,048,576"),
        (b"", "it must be a mapping"),
        (b"{}", "must be given"),
        (b"{1: 2, a: 3, null: 4}", "unknown 1, None, a"),
    ],
)
@pytest.mark.parametrize("option", ["cluster", "model", "lengths"])
def test_files_that_describe_nothing_end_with_one_line(
    option: str,
    content: bytes,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "described.yaml"
    file.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["parallel", "simulate", f"--{option}", str(file)])
    assert main() == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert said in error or (option == "lengths" and "rising `edges`" in error)
    assert error.count("\n") == 1
    assert len(error) < 1000


@pytest.mark.parametrize("value", [".nan", ".inf", "true", "0", "-1", "1.5", "x", "[1]", "9" * 400])
def test_a_described_cluster_has_whole_numbers_that_can_be_reckoned_with(
    value: str, tmp_path: Path
) -> None:
    described = (Path(planning.__file__).parent / "clusters" / "h800.yaml").read_text(
        encoding="utf-8"
    )
    file = tmp_path / "mine.yaml"
    file.write_text(re.sub(r"(?m)^nics:.*", f"nics: {value}", described), encoding="utf-8")
    with pytest.raises(ValueError, match=r"nics is .* whole number above 0, at most"):
        load_cluster(str(file))


def test_a_described_model_names_its_mixer(tmp_path: Path) -> None:
    """A hybrid with KDA takes longer than one with GLA; a mixer that is none ends in one line."""
    file = tmp_path / "model.yaml"
    shape = "{layers: 8, dim: 1024, heads: 8, kv_heads: 8, mlp_dim: 2816, full_every: 4, mixer: "
    bounds = []
    for mixer in ("gla", "kda"):
        file.write_text(f"{shape}{mixer}}}")
        bounds.append(lower_bound(replace(a_case([4096] * 8, 8), model=load_model(str(file)))))
    assert bounds[0] < bounds[1]
    for wrong in ("[kda]", "3", "gru", "null"):
        file.write_text(f"{shape}{wrong}}}")
        with pytest.raises(ValueError, match="it must be one of linear, retention") as caught:
            load_model(str(file))
        assert "\n" not in str(caught.value)
