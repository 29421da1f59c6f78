"""What `plan` says of memory is what is allocated: on a CPU to 10 %, and on meta tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import parallel
from kernels.backend import imagining
from kernels.triton.launch import launching_nothing
from parallel import World, join
from train.config import Config, read
from train.engine import Engine, dtype_of
from train.forecast.activations import Shape, parts
from train.forecast.case import Case
from train.forecast.ledger import Ledger
from train.forecast.memory import Step
from train.forecast.states import States
from train.model.transformer import Model
from train.planning import by_rows, planner_of

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
SMOKE = ROOT / "configs" / "smoke.yaml"
SMALL = ["model.dim=64", "data.vocab_size=1024", "train.batch_tokens=256", "train.seq_len=256"]
HEADS = "{heads: 2, head_dim: 32}"
RUNS = {
    "stage 0": ["zero.stage=0", "model.tie_embeddings=false"],
    "stage 0 in bf16, accumulated": ["zero.stage=0", "train.dtype=bf16", "train.accumulate=2"],
    "stage 1, many short sequences": ["train.seq_len=32", "train.batch_tokens=1024"],
    "stage 1 in bf16": ["train.dtype=bf16", "optim.name=adamw"],
    "stage 2, KDA": ["zero.stage=2", "model.pattern=[kda]", f"model.mixers.kda={HEADS}"],
    "stage 2 in bf16, accumulated": ["zero.stage=2", "train.dtype=bf16", "train.accumulate=2"],
    "stage 3": ["zero.stage=3", "optim.name=adamw", "model.tie_embeddings=false"],
    "checkpointed": ["model.checkpoint_activations=true", "train.batch_tokens=1024"],
    "Mamba-2, HGRN, a window": [
        "model.pattern=[mamba2, hgrn, local]",
        "model.mixers={mamba2: {head_dim: 16}, local: {kind: attention, heads: 2, window: 64}}",
        "model.layers=3",
        "train.batch_tokens=512",
    ],
    "a large vocabulary": ["data.vocab_size=20000", "train.batch_tokens=512", "model.layers=1"],
    "wide MLPs, attention alone": [
        "model.pattern=[attention]", "model.mlp_dim=512", "model.dim=128", "optim.name=adamw",
    ],
}  # fmt: skip


def tensors(case: Case) -> float:
    config = case.config
    return case.memory(config.zero.stage, config.model.checkpoint_activations).tensors


def case_of(config: Config, ranks: int = 1, device: Any = "cpu") -> Case:
    return Case(config, ranks, ranks, 1e12, device, dtype_of(config.train, device))


def alive() -> dict[int, int]:
    """Bytes of every storage that tensors of this process have, by its address."""
    found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in found if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measured(world: World, words: list[str]) -> int:
    """The most bytes that torch has allocated at a time in the second step of a run."""
    config, rng = read(SMOKE, words), np.random.default_rng(0)
    vocab_size, dtype = config.data.vocab_size, dtype_of(config.train, "cpu")
    bounds = np.arange(0, config.train.batch_tokens + 1, config.train.seq_len)
    gc.collect()
    before = alive()
    model = Model(config.model, vocab_size)
    rows = by_rows(config, model, world.topology, dtype)
    engine = Engine(model, config.optim, config.zero, world, dtype, config.train.accumulate, rows)

    def step() -> None:
        for _ in range(config.train.accumulate):
            tokens = rng.integers(0, vocab_size, config.train.batch_tokens)
            shard = parallel.distribute(tokens, tokens, bounds, world, planner=planner)
            loss, cross_entropy = engine(*shard)
            engine.backward(loss)
            del loss, cross_entropy, shard
            engine.step(1e-3)

    with closing(planner_of(model, config.parallel, world, dtype)) as planner:
        step()
        gc.collect()
        states = {at: size for at, size in alive().items() if at not in before}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(states.values()) + int(np.cumsum(changes).max())


@pytest.fixture(scope="module")
def alone(world: None) -> Iterator[World]:
    with join() as found:
        yield found


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS.keys())
def test_of_a_run_on_a_cpu(words: list[str], alone: World) -> None:
    """To 10 %; most are within one."""
    words = [*SMALL, "model.layers=2", *words]
    assert tensors(case_of(read(SMOKE, words))) == pytest.approx(measured(alone, words), rel=0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_of_two_ranks_that_share_a_sequence(ranks: Any, stage: int) -> None:
    words = [*SMALL, "train.batch_tokens=1024", "train.seq_len=1024", f"zero.stage={stage}"]
    found = ranks(2).run(measured, words)
    assert tensors(case_of(read(SMOKE, words), ranks=2)) == pytest.approx(max(found), rel=0.1)


EXPERTS = [
    *SMALL, "model.layers=2", "model.mlp_pattern=[experts]", "parallel.experts=rows",
    "model.mlps.experts={experts: 8, chosen: 3, dim: 128, aux_loss: 0.01, z_loss: 0.001}",
]  # fmt: skip
WITH_ROWS = {
    "stage 2": ["zero.stage=2"],
    "stage 3, many tokens": ["zero.stage=3", "train.batch_tokens=2048"],
    "stage 1 in bf16, accumulated, replicas": [
        "zero.stage=1", "train.dtype=bf16", "train.accumulate=2",
        "model.mlps.experts.experts=1", "model.mlps.experts.chosen=1",
    ],
    "checkpointed, AdamW": ["model.checkpoint_activations=true", "optim.name=adamw"],
}  # fmt: skip


@pytest.mark.parametrize("words", WITH_ROWS.values(), ids=WITH_ROWS.keys())
def test_of_two_ranks_with_experts_at_home(ranks: Any, words: list[str]) -> None:
    words = [*EXPERTS, *words]
    found = ranks(2).run(measured, words)
    assert tensors(case_of(read(SMOKE, words), ranks=2)) == pytest.approx(max(found), rel=0.1)


@pytest.mark.parametrize(("experts", "here", "share"), [(512, 8, 1), (32, 1, 2)])
def test_states_of_80b_with_experts_at_home_by_hand(experts: int, here: int, share: int) -> None:
    """On 64 ranks: a 64th of 512 experts is 8 on a rank; of 32 two ranks share one."""
    words = ["parallel.experts=rows", "zero.stage=2", "optim.name=adamw"]
    words += [f"model.mlps.experts.experts={experts}", "train.batch_tokens=65536"]
    config = read(ROOT / "configs" / "recipes" / "qwen3_next.yaml", words)
    made = Case(config, 64, 8, 141e9, "cuda", torch.bfloat16)
    an_expert = 3 * 2048 * 512 * 48  # in all layers
    others = made.sizes.total - experts * an_expert
    kinds = made.memory(2, True).kinds
    assert kinds["weights"] == 2 * (others + here * an_expert)
    assert kinds["optimiser"] == pytest.approx(12 * (others / 64 + here * an_expert / share))


@pytest.mark.parametrize(
    ("loss", "numbers"), [("aux_loss", 0), ("z_loss", 1), ("sequence_loss", 1)]
)
def test_losses_of_balance_keep_numbers_of_tokens_and_experts(loss: str, numbers: int) -> None:
    """So many in fp32 at least: the auxiliary loss needs scores alone, which the router keeps."""
    many = "model.mlps.experts={experts: 256, chosen: 2, dim: 8, router: sigmoid}"
    words = [*EXPERTS[:-1], many, "model.layers=1", f"model.mlps.experts.{loss}="]
    kept = []
    for weight in ("0.0", "0.1"):
        config = read(SMOKE, [*words[:-1], words[-1] + weight])
        shape = Shape("cpu", torch.float32, 256, False)
        made = parts(config.model, shape, parallel.shard([256], "cpu"))
        kept.append(made[config.model.block_kinds[0]].kept)
    assert numbers <= (kept[1] - kept[0]) / (4 * 256 * 256) < 3 * numbers + 0.1


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_of_the_shipped_models_on_a_gpu_that_is_not_there(file: Path, checkpointed: bool) -> None:
    """A forward and backward pass of a whole model, beside what its parts say; to 1 %."""
    config = read(file, ["model.layers=8"])
    shape = Shape("cuda", torch.bfloat16, config.data.vocab_size, checkpointed)
    shard = parallel.shard([2048, 1024, 1024], "cpu")
    with torch.device("meta"):
        model = Model(config.model, config.data.vocab_size).to(torch.bfloat16)
        tokens = torch.empty(shard.tokens, dtype=torch.int64)
    model.config.checkpoint_activations = checkpointed
    with imagining("cuda"), launching_nothing("sm_90"), Ledger() as ledger:
        loss, _ = model(tokens, tokens, shard)
        loss.backward()
        del loss
    gradients = 2.0 * sum(parameter.numel() for parameter in model.parameters())
    nothing = States(0, 0, 0, gradients, 0, False, 0, 0, 0)
    made = parts(config.model, shape, shard)
    tied = config.model.tie_embeddings
    peak = Step(config.model.block_kinds, made, nothing, 0, 1, tied).peak()
    assert sum(peak.values()) == pytest.approx(ledger.peak, rel=0.01)
    assert ledger.live == pytest.approx(gradients, rel=1e-3)  # nothing else is left
