"""The planner is told what a model's layers are like."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from kernels import flops
from parallel import ParallelConfig, World, join
from parallel.planning.clusters import Recurrent, load_cluster
from parallel.planning.costs import States
from parallel.planning.layout import Topology
from train.config import Config, ZeroConfig
from train.engine import Engine
from train.model.config import ModelConfig
from train.model.transformer import Model, skeleton
from train.optimiser.optim import OptimConfig
from train.planning import by_rows, planner_of

HEADS: dict[str, Any] = {"heads": 2, "value_heads": 4, "head_dim": 16, "value_head_dim": 32}
DIM = 64


def states_of(pattern: list[str]) -> States | None:
    given = {
        "gated_deltanet": HEADS,
        "gla": HEADS,
        "hgrn": {},
        "window": {"kind": "attention", "heads": 4, "window": 8},
        "attention": {"heads": 4},
    }
    config = ModelConfig(
        dim=DIM,
        layers=len(pattern),
        pattern=pattern,
        mixers={name: given[name] for name in set(pattern)},
    )
    model = Model(config, 32)
    world = World(0, 1, 0, torch.device("cpu"))
    with closing(planner_of(model, ParallelConfig(), world, torch.bfloat16)) as planner:
        return planner.costs.states


def test_the_rest_of_the_work_is_all_but_attention() -> None:
    """Products at their speed, mixers at theirs (here those of 4 heads of 16 × 32)."""
    config = ModelConfig(
        dim=DIM,
        layers=4,
        pattern=["gated_deltanet", "attention"],
        mixers={"gated_deltanet": HEADS, "attention": {"heads": 4}},
    )
    model, world = Model(config, 32), World(0, 1, 0, torch.device("cpu"))
    h800 = load_cluster("h800")
    with closing(planner_of(model, ParallelConfig(), world, torch.bfloat16)) as planner:
        costs = planner.costs
    told = h800.recurrence["gated_deltanet"]
    scale = flops.linear_attention([1], 4, 16, 32, True)
    scale /= 1e9 * flops.linear_attention([1], 1, 128, 128, True)
    products = 2 * model.matmul_parameters / h800.matmul_flops
    for passes, mixer, times in (
        (costs.rest, told.forward, 1),
        (costs.rest * costs.rest_backward, told.backward, 2),
    ):
        # Two layers of attention. A block touches 10 DIM numbers in norms and residuals and 3 · 192
        # in its MLP; what its mixer projects twice, and its output three times.
        rest = 2 * passes - times * products - 2 * scale * mixer
        numbers = (640 + 576 + 2 * 328 + 3 * 128) + (640 + 576 + 2 * 1024 + 3 * 256)
        assert rest == pytest.approx(times * 2 * 2 * numbers / (1e9 * h800.memory_gbs))


def test_a_window_and_a_model_without_full_attention_have_their_work() -> None:
    """Without full attention no pair is priced, so that shards are made even by the other work."""
    for pattern in (["gla"], ["window", "gla"]):
        given: dict[str, Any] = {"gla": HEADS, "window": {"kind": "attention", "window": 8}}
        config = ModelConfig(
            dim=DIM, layers=3, pattern=pattern, mixers={name: given[name] for name in pattern}
        )
        model, world = Model(config, 32), World(0, 4, 0, torch.device("cpu"))
        with closing(planner_of(model, ParallelConfig(), world, torch.bfloat16)) as planner:
            made = planner.plan(np.array([4000, 30, 20, 10, 3000, 940]))
            assert (planner.costs.pair, planner.costs.q_bytes, planner.costs.kv_bytes) == (0, 0, 0)
            assert planner.costs.rest > 0
            assert planner.costs.states is not None
        assert made.stream.tokens.tolist() == [2000] * 4
        assert len(made.crossing) <= 2


def test_of_the_delta_rule() -> None:
    """Three layers for one of attention; M is a matrix; the gate is projected meanwhile."""
    states = states_of(["gated_deltanet", "gated_deltanet", "gated_deltanet", "attention"])
    assert states is not None
    assert (states.layers, states.heads) == (3, 4)
    assert (states.M_bytes, states.E_bytes) == (4 * 16 * 16, 4 * 16 * 32)
    h800 = load_cluster("h800")
    assert states.beside == pytest.approx(2 * DIM * (4 * 32) / h800.matmul_flops)
    times = h800.seconds(Recurrent("gated_deltanet", 4, 16, 32))
    assert states.passes == pytest.approx((times.middle - times.forward, times.gradient))
    assert states.halo_bytes == 2 * 3 * (16 * 2 * 2 + 32 * 4)


def test_of_a_decay_alone() -> None:
    """M is a diagonal."""
    states = states_of(["gla", "attention"])
    assert states is not None
    assert (states.layers, states.M_bytes) == (1, 4 * 16)


@pytest.mark.parametrize("pattern", [["attention"], ["hgrn", "attention"], ["window", "attention"]])
def test_of_layers_without_large_states(pattern: list[str]) -> None:
    assert states_of(pattern) is None


def test_the_same_when_zero_3_has_taken_the_weights(world: None) -> None:
    """Then a rank's parameters are empty, and their shapes with them."""
    config = ModelConfig(pattern=["mamba2", "attention"], layers=2, dim=DIM)
    alone, model = World(0, 1, 0, torch.device("cpu")), Model(config, 32)
    with closing(planner_of(model, ParallelConfig(), alone, torch.float32)) as planner:
        before = planner.costs
    with join() as one:
        Engine(model, OptimConfig(), ZeroConfig(3), one, torch.float32, 1)
    assert not model.blocks[0].mixer.conv.numel()
    with closing(planner_of(model, ParallelConfig(), alone, torch.float32)) as planner:
        assert planner.costs == before


@pytest.mark.parametrize(("stage", "moved"), [(0, 2), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize(("recompute", "passes"), [(False, 2), (True, 3)])
def test_rows_travel_in_the_layers_where_they_should_be_fewer_bytes(
    stage: int, moved: int, recompute: bool, passes: int
) -> None:
    """Four ranks on a node, 8 experts of which a token meets 2: it meets none of another rank's two
    with the chance C(6, 2) / C(8, 2) = 15 / 28. Weights come `moved` times from three of four."""
    layer = {"experts": 8, "chosen": 2, "dim": 16}
    model = skeleton(
        ModelConfig(
            pattern=["gla"], layers=3, dim=32, mixers={"gla": {"heads": 2, "head_dim": 8}},
            mlp_pattern=["swiglu", "few", "many"],
            mlps={
                "few": {"kind": "experts", **layer},
                "many": {"kind": "experts", **layer, "dim": 64},
            },
        ),
        61,
    )  # fmt: skip
    a_token = passes * 3 * (1 - 15 / 28) * (2 * 32 * 2 + 4 * 2)
    tokens = {dim: 4 * moved * 3 / 4 * (8 * 3 * dim * 32 * 2) / a_token for dim in (16, 64)}
    config = Config(parallel=ParallelConfig(experts="auto"), zero=ZeroConfig(stage))
    config.model.checkpoint_activations = recompute

    def layers(batch: float) -> list[str]:
        config.train.batch_tokens = int(batch)
        found = by_rows(config, model, Topology(4, 4), torch.bfloat16, said.append)
        assert set(found.values()) <= {config.parallel.experts == "auto"}
        return list(found)

    said: list[str] = []
    assert layers(0.99 * tokens[16]) == ["blocks.1.mlp", "blocks.2.mlp"]
    assert layers(1.01 * tokens[16]) == layers(0.99 * tokens[64]) == ["blocks.2.mlp"]
    assert layers(1.01 * tokens[64]) == []
    assert [line[:32] for line in said] == [
        f"rows travel to experts in {n} of 2" for n in (2, 1, 1, 0)
    ]
    config.parallel.experts = "rows"
    assert layers(1e9) == ["blocks.1.mlp", "blocks.2.mlp"]
    config.parallel.experts = "weights"
    assert layers(1) == []
