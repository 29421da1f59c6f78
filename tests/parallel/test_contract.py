"""The contract: however a batch is divided over ranks, a model's loss and gradients are the same.

A hybrid trains under DeepSpeed on 2 to 4 ranks; losses, gradient norms and the first step's
gradient of every parameter are compared with a plain loop on one process, which cuts nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel import ParallelConfig, World, distribute
from parallel.config import Attention, Experts
from parallel.travel.rows import Rows
from tests.balance import Layer
from tests.parallel.across import lopsided_shards, plans_in_waves
from tests.streams import Stream, streams
from train.config import ZeroConfig
from train.engine import Engine
from train.experts import GRADIENT, layers_of
from train.model.config import ModelConfig
from train.model.mlps.experts import MLP
from train.model.transformer import Model
from train.optimiser.optim import OptimConfig

VOCABULARY, RATE, STEPS = 61, 1e-2, 2
# An epsilon above round-off: a gradient that is nothing else must move no weight a whole step.
OPTIM = OptimConfig(lr=RATE, warmup_steps=0, weight_decay=0.1, clip=0.5, eps=1e-6)
MODEL = ModelConfig(
    pattern=["gated_deltanet", "sliding", "attention"],
    layers=3,
    dim=24,
    mixers={
        "gated_deltanet": {"heads": 1, "value_heads": 2, "head_dim": 8},
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8},
        "sliding": {"kind": "attention", "heads": 2, "head_dim": 8, "window": 7},
    },
)
HEADS = {"heads": 2, "head_dim": 8}
# Every other mixer, a few in a model.
FAMILIES = {
    "linear": {"linear_attention": HEADS, "retnet": HEADS, "lightning": HEADS, "gla": HEADS},
    "delta": {"deltanet": HEADS, "kda": HEADS, "mamba2": {**HEADS, "state_dim": 8}},
    "gated": {"hgrn": {"state_dim": 20}, "hgrn2": HEADS, "lightnet": HEADS},
    "softmax": {"hedgehog": HEADS, "transnormer": {**HEADS, "block": 9}, "liger": HEADS},
}
# Models with experts: by score and group, and with all that a layer of them may have beside them.
ROUTED = {
    "experts": {"experts": 8, "chosen": 3, "dim": 10, "shared_dim": 8, "shared_gate": True},
    "grouped": {
        "kind": "experts", "experts": 6, "chosen": 2, "dim": 10, "router": "sigmoid", "bias": True,
        "groups": 3, "chosen_groups": 2, "scaling": 2.5, "activation": "relu2", "latent": 8,
    },
}  # fmt: skip
# What balances them, by block.
BALANCED = {
    1: {"aux_loss": 0.5, "z_loss": 0.01, "sequence_loss": 0.3},
    2: {"bias_update": "proportional", "bias_rate": 0.05, "sequence_loss": 0.2},
}
# Fewer experts than ranks: they have replicas.
FEW = {
    "experts": {"experts": 3, "chosen": 2, "dim": 10, "shared_dim": 8},
    "two": {"kind": "experts", "experts": 2, "chosen": 1, "dim": 10, "normalise": False},
}
# Lengths of batches of one stream after the other, two a step at most.
STREAMS = [
    [101],  # one sequence over all ranks
    [3, 1, 2, 40, 1, 7, 5, 2, 1, 1, 38],
    [2] * 50 + [1],  # a target in every other token, in every second rank's favour
    [5],  # some ranks hold one token, some none of it
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the same training is divided over ranks."""

    attention: Attention
    stage: int = 1
    accumulate: int = 1
    recompute: bool = False
    family: str | None = None
    each: int | None = None  # ranks a node, if not all are on one
    waves: int = 1  # of heads
    lopsided: bool = False  # shards are anything but even
    experts: Experts = "weights"  # what travels for them
    spread: float = 2.0  # of rows, over which they take turns


def steps(accumulate: int) -> list[list[Stream]]:
    """The streams of each step; the first half of the second stream has no targets."""
    every = streams(STREAMS, VOCABULARY)
    every[1].labels[:54] = -100
    return [every[s * accumulate : (s + 1) * accumulate] for s in range(STEPS)]


def model(family: str | None, recompute: bool = False, balanced: bool = True) -> Model:
    torch.manual_seed(0)
    config = MODEL
    if family == "experts":
        on = dict(zip(ROUTED, BALANCED.values(), strict=True)) if balanced else {}
        off = {"experts": {}, "grouped": {"bias_update": "none"}}
        mlps = {name: made | (on or off)[name] for name, made in ROUTED.items()}
        config = dataclasses.replace(
            MODEL, mlp_first=["swiglu", "experts", "grouped"], mlp_pattern=["none"], mlps=mlps
        )
    elif family == "few experts":
        config = dataclasses.replace(MODEL, mlp_first=["swiglu"], mlp_pattern=list(FEW), mlps=FEW)
    elif family is not None:
        mixers = FAMILIES[family]
        config = ModelConfig(pattern=list(mixers), layers=len(mixers), dim=24, mixers=mixers)
    made = Model(dataclasses.replace(config, checkpoint_activations=recompute), VOCABULARY)
    for name, buffer in made.named_buffers():
        if name.endswith("load"):  # of a step before, in which it was uneven
            buffer.copy_(torch.arange(len(buffer)) / torch.arange(len(buffer)).sum())
    return made


def targets(group: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> int:
    return sum(int((labels >= 0).sum()) for _, labels, _ in group)


# Losses and norms by step; every parameter's gradient in the first step, and buffers at the end.
Course = tuple[list[float], list[float], dict[str, Tensor]]


@functools.cache
def plain(accumulate: int, family: str | None) -> Course:
    """The definition: the gradient of the mean over a step's targets, clipped, and AdamW."""
    net, alone = model(family, balanced=False), World(0, 1, 0, torch.device("cpu"))
    on = BALANCED if family == "experts" else {}
    layers = [
        Layer(block.mlp.router, on.get(number, {}))
        for number, block in enumerate(net.blocks)
        if isinstance(block.mlp, MLP)
    ]
    matrices = [p for n, p in net.named_parameters() if p.dim() >= 2 and n.endswith(".weight")]
    rest = [p for n, p in net.named_parameters() if not (p.dim() >= 2 and n.endswith(".weight"))]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=RATE,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    losses, norms, gradients = [], [], {}
    for group in steps(accumulate):
        loss = 0.0
        for batch in group:
            nats, _ = net(*distribute(*batch, alone))
            loss += float(nats.detach()) / targets(group)
            balance = sum(layer.losses(batch.labels, batch.cu_seqlens) for layer in layers)
            ((nats + balance) / targets(group)).backward()
        gradients = gradients or {n: p.grad.clone() for n, p in net.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        adamw.step()
        adamw.zero_grad()
        losses.append(loss)
        with torch.no_grad():
            for layer in layers:
                layer.end()
    return losses, norms, gradients | dict(net.named_buffers())


def shared(world: World, setting: Setting) -> Course:
    world = dataclasses.replace(world, ranks_per_node=setting.each or world.size)
    config = ParallelConfig(attention=setting.attention)
    with (
        plans_in_waves(setting.waves),
        lopsided_shards() if setting.lopsided else nullcontext(),
        mock.patch.object(Rows, "spread", setting.spread),
    ):
        return course(world, config, setting)


def course(world: World, config: ParallelConfig, setting: Setting) -> Course:
    net = model(setting.family, setting.recompute)
    engine = Engine(
        net,
        OPTIM,
        ZeroConfig(stage=setting.stage),
        world,
        torch.float32,
        setting.accumulate,
        None
        if setting.experts == "weights"
        else dict.fromkeys(layers_of(net), setting.experts == "auto"),
    )
    losses, norms, gradients = [], [], {}

    def look(_: float) -> bool:
        for name in engine.at_home.stacks:
            gradients.setdefault(name, engine.at_home.full(name, GRADIENT).clone())
        return True

    for group in steps(setting.accumulate):
        count, total = targets(group), torch.zeros((), dtype=torch.float64)
        for batch in group:
            loss, cross_entropy = engine(*distribute(*batch, world, config))
            engine.backward(loss * (world.size * setting.accumulate / count))
            total += cross_entropy
            if batch is group[-1] and not gradients:
                gradients = {name: gradient(p, setting) for p, name in engine.names.items()}
            norm = engine.step(RATE, look)
        losses.append(float(world.sum(total)) / count)
        norms.append(norm)
    return losses, norms, gradients | dict(engine.model.named_buffers())


def gradient(parameter: torch.nn.Parameter, setting: Setting) -> Tensor:
    """The full one, averaged over ranks."""
    if setting.stage == 0:
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter).clone()


# Every strategy at every stage, and accumulation and recomputation with each of both.
SETTINGS = [
    Setting(attention, stage, 1 + (i // 4 + i) % 2, bool(i // 2 % 2), each=(None, 2, 1)[i % 3])
    for i, (attention, stage) in enumerate(
        itertools.product(("balanced", "ring", "ulysses", "allgather"), (0, 1, 2, 3))
    )
]


# On four ranks everything; on two and three, which divide less evenly, each strategy and stage.
CASES = [(4, setting) for setting in SETTINGS]
CASES += [
    (4, Setting(attention, stage, recompute=stage > 1, family=family, each=2))
    for stage, (attention, family) in enumerate(
        zip(("balanced", "ring", "ulysses", "allgather"), FAMILIES, strict=True)
    )
]
CASES += [
    (4, Setting("balanced", stage, 1 + stage // 2, stage % 2 == 0, each=(2, 4)[stage % 2], waves=2))
    for stage in (0, 1, 2, 3)
]
CASES += [
    (4, Setting(attention, stage % 4, 1 + stage % 2, stage > 2, family, each=2, lopsided=True))
    for stage, (attention, family) in enumerate(
        itertools.product(("balanced", "ring"), (None, *FAMILIES))
    )
]
CASES += [
    (size, Setting("balanced", stage, 1 + stage % 2, stage > 1, "experts", each=2))
    for stage, size in enumerate((3, 4, 2, 4))
]
CASES += [(4, Setting("balanced", 1, 2, family="experts", lopsided=True))]
CASES += [
    (
        size,
        Setting("balanced", stage, 1 + (stage + size) % 2, i % 2 == 0, family, 2, experts="rows"),
    )
    for i, (size, stage, family) in enumerate(
        [
            # DeepSpeed sees none of these matrices, at any stage.
            *((2, stage, "experts") for stage in (0, 3)),
            *((3, stage, "experts") for stage in (1, 2)),
            *((4, stage, "few experts") for stage in (0, 1, 2, 3)),
        ]
    )
]
CASES += [
    (4, Setting("balanced", 3, 2, True, "experts", 2, experts="rows", spread=0.3)),
    (3, Setting("balanced", 1, 1, False, "few experts", 2, experts="rows", spread=0.5)),
    # In these batches weights are fewer bytes; in the last one, of a handful of tokens, rows are.
    (4, Setting("balanced", 2, 2, True, "few experts", 2, experts="auto")),
    (3, Setting("balanced", 3, 1, False, "experts", 2, experts="auto")),
]
CASES += [(size, setting) for size in (2, 3) for setting in SETTINGS[size - 2 :: 5]]


@pytest.mark.parametrize(("size", "setting"), CASES, ids=str)
def test_training_is_the_same_however_it_is_shared(ranks, size: int, setting: Setting) -> None:
    """fp32: losses and gradients to 1e-5, norms after a step of AdamW to 1e-4."""
    check(ranks(size).run(shared, setting), plain(setting.accumulate, setting.family))


def check(courses: list[Course], wanted: Course) -> None:
    for losses, norms, gradients in courses:
        np.testing.assert_allclose(losses, wanted[0], rtol=1e-5)
        np.testing.assert_allclose(norms, wanted[1], rtol=1e-4)
        assert gradients.keys() == wanted[2].keys()
        for name, one in wanted[2].items():
            scale = float(one.abs().max())
            error = (gradients[name].reshape(one.shape) - one).abs().max() / scale
            assert error < 1e-5, name
