"""No published alternative has a shorter step than our plan, by the simulator's prices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml

from parallel.planning import plan as planning
from parallel.planning.clusters import clusters, load_cluster
from parallel.planning.layout import Topology
from parallel.simulation import simulate
from parallel.simulation.models import MODELS
from parallel.simulation.strategies import Case, lower_bound, our_plan, price_plan
from tests.parallel.simulation.test_simulate import EVEN_SHARDS, a_case


def known(values: Any, behind: set[Any]) -> list[Any]:
    """The values, of which those are expected to fail in which an alternative is known to be
    ahead, by 0.3 %: it holds more tokens than memory has room for at a time, in micro-batches."""
    marks = pytest.mark.xfail(reason="an alternative is ahead", strict=False)
    return [pytest.param(x, marks=marks) if x in behind else x for x in values]


SETTINGS = [
    ("llama-7b", 16, 1.03),
    ("llama-7b", 64, 1.12),
    ("llama-7b", 256, 1.18),
    ("llama-13b", 64, 1.12),
    ("hybrid-3b", 16, 1.04),
    ("hybrid-7b", 16, 1.03),
    ("hybrid-7b", 64, 1.075),
    ("hybrid-7b", 256, 1.125),
    ("hybrid-7b-gqa", 64, 1.05),
    ("llama-8b-gqa", 64, 1.08),
]


@pytest.mark.parametrize(
    "setting",
    [(lengths, *setting) for setting in SETTINGS for lengths in simulate.distributions()],
)
def test_no_alternative_is_quicker(setting: tuple[str, str, int, float]) -> None:
    """On the cluster with the slowest network, where we also stay near the bound.

    In the mean over batches: on a single one an alternative with unequal shards may be ahead.
    """
    lengths, model, gpus, over_bound = setting
    batches = 4 if gpus < 256 else 2
    given = simulate.Settings("a800", model, lengths, gpus, 4096, 65536, batches, 0)
    rows = simulate.by_strategy(simulate.cases(given))
    ours = rows.pop("headrace")
    assert ours["step_ms"] < min(row["step_ms"] for row in rows.values())
    assert ours["over_bound"] <= over_bound


@pytest.mark.parametrize("seed", range(30))
def test_no_alternative_is_quicker_in_a_random_setting(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def choose(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    given = simulate.Settings(
        cluster=choose(*clusters()),
        model=choose(*MODELS),
        lengths=choose(*simulate.distributions()),
        gpus=choose(8, 12, 16, 24, 32, 48, 64, 128),
        tokens_per_gpu=choose(1024, 2048, 4096, 8192, 16384),
        longest=choose(8192, 32768, 65536, 131072),
        batches=1,
        seed=seed,
    )
    assert_nobody_is_ahead(given)


@pytest.mark.parametrize("seed", known(range(20), {7}))
def test_no_alternative_is_quicker_on_other_lengths(seed: int, tmp_path: Path) -> None:
    """A histogram of few or many bins, of documents of 16 tokens to a million."""
    rng = np.random.default_rng(seed)
    edges = 2 ** np.arange(4, 21)
    shares = rng.dirichlet(np.full(len(edges) - 1, rng.choice([0.1, 0.5])))
    path = tmp_path / "lengths.yaml"
    path.write_text(yaml.safe_dump({"edges": edges.tolist(), "shares": shares.tolist()}))
    gpus, tokens = rng.choice([16, 32, 48, 64, 96]), rng.choice([2048, 4096, 8192, 16384])
    longest = rng.choice([32768, 131072, 1 << 20])
    cluster, model = rng.choice(clusters()), rng.choice(list(MODELS))
    assert_nobody_is_ahead(
        simulate.Settings(
            str(cluster), str(model), str(path), int(gpus), int(tokens), int(longest), 1, seed
        )
    )


@pytest.mark.parametrize(
    ("model", "gpus", "tokens_per_gpu", "over_bound"),
    [("llama-8b-gqa", 64, 4096, 1.06), ("hybrid-7b", 128, 8192, 1.06)],
)
def test_few_long_sequences_come_near_the_bound(
    model: str, gpus: int, tokens_per_gpu: int, over_bound: float
) -> None:
    """Up to two a node, and up to 64 times as long as one another; the mean of eight batches."""
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        shares = 2.0 ** rng.uniform(0, 6, rng.integers(2, gpus // 4))
        lengths = (gpus * tokens_per_gpu * shares / shares.sum()).astype(int).tolist()
        case = replace(a_case(lengths, gpus, model), cluster=load_cluster("h200"))
        found.append(price_plan(case, our_plan(case)).seconds / lower_bound(case))
    assert np.mean(found) <= over_bound


def test_no_alternative_is_quicker_in_the_closest_known_setting() -> None:
    """A setting in which one was half a percent ahead for long: the best alternative gives its
    ranks unequal numbers of tokens, and they need not gather weights at the same time."""
    assert_nobody_is_ahead(
        simulate.Settings("h800", "llama-30b", "github", 32, 8192, 131072, 1, 7118)
    )


def assert_nobody_is_ahead(given: simulate.Settings | Case) -> None:
    """No alternative's step is shorter than ours by more than a thousandth."""
    cases = [given] if isinstance(given, Case) else simulate.cases(given)
    rows = simulate.by_strategy(cases)
    ours = rows.pop("headrace")
    assert ours["step_ms"] <= 1.001 * min(row["step_ms"] for row in rows.values())


KINDS = ("one", "few", "equal", "one among short ones", "powers of two")
ODD = [(gpus, kind) for gpus in (2, 3, 5, 7, 8, 12, 24, 36, 64) for kind in KINDS]


@pytest.mark.parametrize("odd", ODD)
def test_no_alternative_is_quicker_on_an_odd_batch(odd: tuple[int, str]) -> None:
    """With 512 tokens a GPU or more; with fewer, a step is mostly latencies."""
    gpus, kind = odd
    rng = np.random.default_rng(gpus)
    tokens = gpus * int(rng.choice([512, 2048, 8192]))
    match kind:
        case "one":
            lengths = [tokens]
        case "few":
            lengths = rng.multinomial(tokens, rng.dirichlet(np.ones(5))).tolist()
        case "equal":
            lengths = [tokens // (7 * gpus)] * (7 * gpus)
        case "one among short ones":
            lengths = [tokens // 3, *rng.multinomial(2 * tokens // 3, np.full(99, 1 / 99))]
        case _:
            lengths = [2**i for i in range(tokens.bit_length()) if tokens >> i & 1]
    model = str(rng.choice(list(MODELS)))
    assert_nobody_is_ahead(a_case(lengths, gpus, model))


@pytest.mark.parametrize("model", ["llama-3b", "hybrid-7b"])
def test_one_document_among_thousands_is_placed_well_at_the_first_try(model: str) -> None:
    """With so many sequences there is time to try only two or three placings."""
    short = np.random.default_rng(0).integers(16, 600, 2700).tolist()
    case = replace(a_case([1_280_000, *short], 128, model), cluster=load_cluster("h200"))
    assert price_plan(case, our_plan(case)).seconds <= 1.01 * lower_bound(case)
    assert_nobody_is_ahead(case)


@pytest.mark.parametrize(
    ("model", "ranks_per_node", "quicker"),
    [
        ("llama-3b", 1, 1.04),
        ("hybrid-3b", 1, 1.04),
        ("hybrid-3b", 3, 1.02),
        ("hybrid-7b", 3, 1.005),
    ],
)
def test_documents_far_shorter_than_a_shard_are_not_cut_to_make_it_even(
    model: str, ranks_per_node: int, quicker: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model of full attention alone, on one node, such cuts gain nothing.

    With so few tokens a step is as long as ZeRO's traffic, which is left out here.
    """
    monkeypatch.setattr(Case, "zero_seconds", 0.0)
    case = replace(a_case([19] * 77, 3, model), cluster=load_cluster("h800"))
    case = replace(case, topology=Topology(3, ranks_per_node))
    made = our_plan(case)
    assert not made.crossing
    assert (made.to_attention.source == made.to_attention.target).all()
    assert sorted(made.stream.tokens.tolist()) == [25 * 19, 26 * 19, 26 * 19]
    step = price_plan(case, made).seconds
    assert step <= 1.014 * lower_bound(case)
    with (
        mock.patch.object(planning, "group_sizes", return_value=[]),
        mock.patch.object(planning, "_LIMITS", EVEN_SHARDS),
    ):
        assert price_plan(case, our_plan(case)).seconds > quicker * step
