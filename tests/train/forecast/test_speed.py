"""How long `plan` says that a step takes, by properties that no price can change."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data import material
from data.batch import Cursor
from data.prepare import prepared
from parallel.planning.clusters import Recurrence, load_cluster
from train.config import Config, read
from train.experts import layers_of
from train.forecast.case import Case
from train.forecast.speed import DAY, Speed

ROOT = Path(__file__).parents[3]
H200 = load_cluster("h200")
WORDS = ["train.batch_tokens=65536", "train.seq_len=16384", "zero.stage=1"]


def speed(config: Config, ranks: int = 1) -> Speed:
    return Speed(Case(config, ranks, min(ranks, 8), 1e12, "cuda", torch.bfloat16, "h200"), H200)


def smoke(*words: str) -> Config:
    return read(ROOT / "configs" / "smoke.yaml", [*WORDS, *words])


@pytest.mark.parametrize("ranks", [1, 16])
@pytest.mark.parametrize("words", [[], ["model.pattern=[kda]"], ["train.accumulate=2"]])
def test_what_a_step_is_worth_follows_from_its_seconds(ranks: int, words: list[str]) -> None:
    made = speed(smoke(*words), ranks)
    times = made.times([made.case.lengths(16384)])
    work = 3 * made.case.model.flops([16384] * 4) * made.case.config.train.accumulate
    assert times.mfu * times.step * 989e12 * ranks == pytest.approx(work)
    assert 0 < times.even <= times.passes * (1 + 1e-9)
    if ranks == 1:
        assert times.passes == pytest.approx(times.even, rel=0.01)


def test_twice_the_speeds_are_half_the_time() -> None:
    half = {"tflops": 2, "memory_gbs": 2, "inside_gb": 2, "nic_gbit": 2, "launch_us": 0.5,
        "latency_inside_us": 0.5, "latency_between_us": 0.5}  # fmt: skip
    quicker = replace(
        H200,
        **{key: factor * getattr(H200, key) for key, factor in half.items()},
        recurrence={
            kind: Recurrence(*(each / 2 for each in vars(times).values()))
            for kind, times in H200.recurrence.items()
        },
    )
    slow = speed(smoke("model.checkpoint_activations=true"), 16)
    lengths = [slow.case.lengths(16384)]
    one, two = slow.times(lengths), Speed(slow.case, quicker).times(lengths)
    for name in ("passes", "anew", "optimiser", "step"):
        assert getattr(one, name) == pytest.approx(2 * getattr(two, name)), name


def test_activations_that_are_made_anew_take_a_forward_pass() -> None:
    plain, anew = speed(smoke()), speed(smoke("model.checkpoint_activations=true"))
    lengths = [plain.case.lengths(16384)]
    one, two = plain.times(lengths), anew.times(lengths)
    assert (one.passes, one.anew) == (two.passes, 0)
    # A backward pass is two to two and a half forward passes, and the head is not made anew.
    assert 0.15 < two.anew / two.passes < 1 / 3


def test_rows_travel_to_experts_and_back_by_the_rates_of_the_links() -> None:
    """All tokens go to all ranks, so how many bytes go each way is known."""
    tokens, k, layers, dim = 65536, 4, 2, 256
    words = [f"model.layers={layers}", f"model.dim={dim}", "model.mlp_pattern=[experts]",
        "model.checkpoint_activations=true", "parallel.experts=rows", "train.accumulate=100",
        f"model.mlps.experts={{experts: {k}, chosen: {k}, dim: 32}}"]  # fmt: skip
    row, weights, numbers = 2 * dim, 4 * k, 2 * k
    forward, backward = 2 * row + weights + numbers, 2 * row + weights
    inside = 4, H200.inside_gb * 1e9, H200.latency_inside_us
    between = 1, H200.nic_gbit / 8 * 1e9 * H200.network, H200.latency_between_us
    for each, rate, latency in (inside, between):
        size = 3 * tokens / 4 * (2 * forward + backward)  # activations are made anew
        wanted = 100 * layers * (size / rate + 6e-6 * latency)
        case = Case(smoke(*words), 4, each, 1e12, "cuda", torch.bfloat16, "h200")
        times = Speed(case, H200).times([case.lengths(16384)])
        assert times.rows == pytest.approx(wanted, rel=0.02)
        assert times.step >= times.passes + times.anew + times.rows
        # Beside a large expert that all tokens share, half of the ways cost nothing.
        words_ = [*words, "model.mlps.experts.shared_dim=65536"]
        case = Case(smoke(*words_), 4, each, 1e12, "cuda", torch.bfloat16, "h200")
        wanted = 100 * layers * (3 * 3 * tokens / 4 * row / rate + 3e-6 * latency)
        found = Speed(case, H200).times([case.lengths(16384)]).rows
        assert found == pytest.approx(wanted, rel=0.02)


def test_zero_brings_no_experts_that_live_at_home() -> None:
    words = ["model.mlp_pattern=[experts]", "model.mlps.experts={experts: 64, dim: 64}"]
    weights, rows = (speed(smoke(*words, *more), 16) for more in ([], ["parallel.experts=rows"]))
    experts = sum(
        layer.up.weight.numel() + layer.out.weight.numel()
        for layer in layers_of(weights.case.model).values()
    )
    less = weights._model.zero_bytes - rows._model.zero_bytes
    assert less == pytest.approx(2 * 2 * experts)  # stage 1: weights and gradients, in bf16
    assert weights.case.planner().costs.weights > rows.case.planner().costs.weights


def test_a_run_is_the_sum_of_its_stages() -> None:
    stages = "data.stages=[{step: 80, seq_len: 32768}, {step: 10, long_weight: 2}, {step: 400}]"
    made = speed(smoke("train.steps=100", stages, "data.long_tokens=8192"), 4).stages()
    assert [(steps, length) for steps, length, _ in made] == [(80, 16384), (20, 32768)]
    assert made[0][2].step < made[1][2].step  # longer sequences are more attention


def test_the_texts_own_lengths_are_those_that_training_reads(config: Path) -> None:
    settings = read(config)
    text = material(settings.data, settings.train)
    found = speed(settings).corpus()
    assert found is not None
    with closing(text.batches(Cursor())) as stream:
        wanted = [np.diff(batch.cu_seqlens) for batch in islice(stream, len(found))]
    assert all((one == two).all() for one, two in zip(found, wanted, strict=True))


def test_text_that_is_not_prepared_stays_so(config: Path, tmp_path: Path) -> None:
    settings = read(config, [f"data.root={tmp_path}/corpora"])
    assert prepared(settings.data) is None
    assert speed(settings).corpus() is None
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_written_by_all_nodes() -> None:
    assert speed(smoke(), 16).saving(2e9) == speed(smoke(), 1).saving(1e9) == 1.0
    assert DAY == 24 * 60 * 60
