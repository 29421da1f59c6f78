"""The engine against a plain AdamW loop in one process: every stage, any ranks, any batching."""

from __future__ import annotations

import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from parallel import World, distribute
from tests.ranks import Ranks
from tests.streams import streams
from train.config import ZeroConfig
from train.engine import Engine
from train.model.config import ModelConfig
from train.model.transformer import Model, skeleton
from train.optimiser.muon import orthogonal
from train.optimiser.optim import OptimConfig, learning_rate

VOCABULARY, STEPS = 97, 4
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1, clip=0.5)
MUON = dataclasses.replace(OPTIM, name="muon")
MODEL = ModelConfig(
    pattern=["gated_deltanet", "attention"],
    layers=2,
    dim=32,
    mixers={
        "gated_deltanet": {"heads": 2, "value_heads": 4, "head_dim": 8},
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8},
    },
)
# Batches of very different shapes; the last one has no target at all.
LENGTHS = [
    [64, 1, 70, 29],
    [164],
    [3] * 50 + [14],
    [5, 2, 90, 67],
    [40, 40, 40, 44],
    [100, 64],
    [1] * 164,
    [80, 84],
]


def model() -> Model:
    return Model(MODEL, VOCABULARY)


class PlainMuon:
    """Muon by its definition: singular values in fp64, momentum as a sum of all gradients."""

    def __init__(self, matrices: list[torch.Tensor]) -> None:
        self.matrices = matrices
        self.seen: list[list[torch.Tensor]] = [[] for _ in matrices]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for matrix, seen in zip(self.matrices, self.seen, strict=True):
            assert matrix.grad is not None
            seen.append(matrix.grad.double())
            mean = sum(0.05 * 0.95**age * g for age, g in enumerate(reversed(seen)))
            u, s, vh = torch.linalg.svd(0.05 * seen[-1] + 0.95 * mean, full_matrices=False)
            s = s / s.square().sum().sqrt()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            update = 0.2 * max(matrix.shape) ** 0.5 * u @ torch.diag(s) @ vh
            matrix.mul_(1 - lr * 0.1).sub_(lr * update)
            matrix.grad = None


def plain(
    accumulate: int, optim: OptimConfig = OPTIM
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The definition: the mean over all targets of a step, clipped, and torch's own AdamW."""
    net, one = model(), World(0, 1, 0, torch.device("cpu"))
    matrices = [p for n, p in net.named_parameters() if p.dim() == 2 and n.endswith(".weight")]
    rest = [p for n, p in net.named_parameters() if not (p.dim() == 2 and n.endswith(".weight"))]
    muon = PlainMuon([])
    if optim.name == "muon":
        inside = [p for p in matrices if p is not net.embedding.weight]
        muon, matrices = PlainMuon(inside), [net.embedding.weight]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    everything = streams(LENGTHS, VOCABULARY)
    for step in range(STEPS):
        group = everything[step * accumulate : (step + 1) * accumulate]
        targets = max(1, sum(int((b.labels >= 0).sum()) for b in group))
        total = sum(net(*distribute(b.tokens, b.labels, b.cu_seqlens, one))[0] for b in group)
        (total / targets).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        for settings in adamw.param_groups:
            settings["lr"] = learning_rate(OPTIM, step, STEPS)
        muon.step(learning_rate(OPTIM, step, STEPS))
        adamw.step()
        adamw.zero_grad()
        losses.append(float(total.detach()) / targets)
    return losses, norms, {n: p.detach() for n, p in net.named_parameters()}


def trained(
    world: World,
    stage: int,
    accumulate: int,
    dtype: torch.dtype,
    recompute: bool = False,
    optim: OptimConfig = OPTIM,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    net = model()
    net.config = dataclasses.replace(net.config, checkpoint_activations=recompute)
    engine = Engine(net, optim, ZeroConfig(stage=stage), world, dtype, accumulate)
    losses, norms = [], []
    everything = streams(LENGTHS, VOCABULARY)
    for step in range(STEPS):
        group = everything[step * accumulate : (step + 1) * accumulate]
        targets = max(1, sum(int((b.labels >= 0).sum()) for b in group))
        total = torch.zeros((), dtype=torch.float64)
        for batch in group:
            loss, cross_entropy = engine(
                *distribute(batch.tokens, batch.labels, batch.cu_seqlens, world)
            )
            engine.backward(loss * (world.size * accumulate / targets))
            norm = engine.step(learning_rate(OPTIM, step, STEPS))
            total += cross_entropy
        losses.append(float(world.sum(total)) / targets)
        norms.append(norm)
    weights = {name: full.clone() for name, key, full in engine.gather() if key == "weight"}
    return losses, norms, weights


def assert_same(got: tuple, wanted: tuple, tolerance: float) -> None:
    np.testing.assert_allclose(got[0], wanted[0], rtol=tolerance)
    np.testing.assert_allclose(got[1], wanted[1], rtol=10 * tolerance)
    assert got[2].keys() == wanted[2].keys()
    for name, weight in wanted[2].items():
        torch.testing.assert_close(got[2][name], weight, rtol=0, atol=20 * tolerance, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_training_equals_a_plain_loop(ranks, size: int, stage: int) -> None:
    """fp32: to 2e-5 of the loss after four steps of AdamW; every stage, and all ranks, with one
    batch a step and with two."""
    accumulate = 1 + (size + stage) % 2
    wanted = plain(accumulate)
    for got in ranks(size).run(trained, stage, accumulate, torch.float32):
        assert_same(got, wanted, 2e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_muon_equals_its_definition(ranks, size: int, stage: int) -> None:
    """fp32: to 1e-4 of the loss, as a fifth power is taken five times."""
    wanted = plain(1, MUON)
    for got in ranks(size).run(trained, stage, 1, torch.float32, False, MUON):
        assert_same(got, wanted, 1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_in_bf16_works_on_fp32_weights(ranks, stage: int) -> None:
    """The loss to 2 %."""
    wanted = plain(1, MUON)
    losses, _, weights = ranks(2).run(trained, stage, 1, torch.bfloat16, False, MUON)[0]
    np.testing.assert_allclose(losses, wanted[0], rtol=2e-2)
    assert weights["blocks.0.mlp.up.weight"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(24, 24), (65, 16), (7, 40), (1, 9)])
def test_an_orthogonal_update_is_that_of_torch(shape: tuple[int, int]) -> None:
    """torch.optim.Muon works in bf16: to 0.02, a tenth of the update's root mean square."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    ours.data.sub_(orthogonal(theirs.grad))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_changes_nothing(ranks, stage: int) -> None:
    wanted = plain(1)
    for got in ranks(2).run(trained, stage, 1, torch.float32, True):
        assert_same(got, wanted, 2e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_fp32_weights(ranks, stage: int) -> None:
    """bf16 forward and backward: the loss to 2 %, and weights that bf16 could not hold."""
    wanted = plain(1)
    losses, _, weights = ranks(2).run(trained, stage, 1, torch.bfloat16)[0]
    np.testing.assert_allclose(losses, wanted[0], rtol=2e-2)
    weight = weights["blocks.0.mlp.up.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def has_compiler(world: World, optim: OptimConfig) -> bool:
    """Whether training imports torch's compiler. Its front, which a fork has from its parent,
    cannot be imported here."""
    with mock.patch.dict(sys.modules, {"torch._dynamo": None}):
        skeleton(MODEL, VOCABULARY)
        trained(world, 1, 1, torch.float32, optim=optim)
        return "torch._inductor.compile_fx" in sys.modules


def test_training_imports_no_compiler() -> None:
    """Torch's optimisers and first values do, and DeepSpeed's Muon: two seconds of a start."""
    world = Ranks(1)  # one that has run nothing else
    try:
        assert world.run(has_compiler, OPTIM) == [False]
        assert world.run(has_compiler, MUON) == [False]
    finally:
        world.close()
