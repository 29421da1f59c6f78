"""Every MLP there is a file for, and experts against transformers' own blocks, router by router.

A new file is tested by being there. Models are fp64, so agreement is to 1e-9.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.settings import ConfigError
from parallel import shard
from train.model import mlps
from train.model.config import ModelConfig
from train.model.mlps._router import best
from train.model.transformer import Model, check_settings

VOCABULARY, DIM = 31, 16
EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {},
    "experts-groups": {"router": "sigmoid", "bias": True, "groups": 4, "chosen_groups": 2},
    "experts-latent": {"activation": "relu2", "latent": 8, "shared_dim": 12},
    "experts-clamped": {"activation": "clamped_swiglu", "limit": 0.1, "shared_dim": 12},
    "experts-gated": {"router": "sqrtsoftplus", "shared_dim": 12, "shared_gate": True},
    "experts-one": {"experts": 1, "chosen": 1, "of_chosen": True},
}
KINDS = list(dict.fromkeys([*mlps.names(), *EXPERTS]))


def config(kind: str) -> ModelConfig:
    name = kind.partition("-")[0]
    settings = {"experts": 8, "chosen": 3, "dim": 20} | EXPERTS[kind] if kind in EXPERTS else {}
    return ModelConfig(
        pattern=["gla"], layers=2, dim=DIM, init_std=0.3, mlp_pattern=[name],
        mixers={"gla": {"heads": 2, "head_dim": 8}}, mlps={name: settings},
    )  # fmt: skip


def make(kind: str) -> Model:
    torch.manual_seed(1)
    made = config(kind)
    check_settings(made)
    return Model(made, VOCABULARY).double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_as_if_alone(kind: str) -> None:
    mlp = make(kind).blocks[0].mlp
    if mlp is None:
        return
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    for row, whole in zip(x[0], mlp(x)[0], strict=True):
        torch.testing.assert_close(mlp(row.view(1, 1, -1)).flatten(), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_its_gradient(kind: str) -> None:
    """Against differences of the loss, along the gradient itself."""
    model = make(kind)
    ids = torch.randint(VOCABULARY, (40,))
    labels, here = ids.roll(-1), shard([40], "cpu")
    model(ids, labels, here)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".mlp." not in name or not parameter.grad.abs().max():
            continue
        step = 1e-6 * parameter.grad / parameter.grad.norm()
        losses = []
        with torch.no_grad():
            for way in (step, -2 * step, step):
                parameter.add_(way)
                losses.append(float(model(ids, labels, here)[0]))
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx(float(parameter.grad.norm()), rel=1e-4), name


def test_a_block_without_an_mlp_has_no_norm_of_one() -> None:
    names = [name for name, _ in make("none").named_parameters()]
    assert not [name for name in names if "mlp" in name]


def test_patterns_say_which_block_has_which_mlp() -> None:
    made = ModelConfig(
        pattern=["gla"], layers=5, mlp_pattern=["swiglu", "experts*2"], mlp_first=["gelu", "none"]
    )
    assert made.mlp_blocks == ["gelu", "none", "experts", "swiglu", "experts"]


def test_a_token_pays_for_the_experts_that_it_chooses() -> None:
    """8 experts of 3 · 20 · 16 numbers, of which 3 are met; the router is."""
    model = make("experts")
    dense = make("none")
    more = model.matmul_parameters - dense.matmul_parameters
    assert more == 2 * (3 * 3 * 20 * DIM + 8 * DIM)
    assert model.matrices - dense.matrices == 2 * (8 * 3 * 20 * DIM + 8 * DIM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chosen": 9}, "chosen is 9; it must be at most experts, 8"),
        ({"groups": 3}, "groups is 3; it must be a divisor of experts, 8"),
        ({"groups": 2, "chosen_groups": 3}, "chosen_groups is 3; it must be at most groups, 2"),
        ({"groups": 8}, "each group must have 2 experts"),
        ({"groups": 4, "chosen": 3}, "1 groups of 2 experts have only 2"),
        ({"of_chosen": True, "router": "sigmoid"}, "router must be softmax"),
        ({"shared_gate": True}, "there is no shared expert"),
        ({"bias_update": "sign"}, "bias_update is sign, but bias is false"),
        ({"bias_update": "signs"}, "bias_update is signs; it must be one of sign, proportional"),
        ({"bias": True, "bias_rate": -1}, "bias_rate is -1"),
        ({"chose": 1}, "did you mean chosen"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_settings(ModelConfig(mlp_pattern=["experts"], mlps={"experts": settings}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"mlp_pattern": ["glu"]}, {"mlps": {"glu": {}}}])
def test_an_unknown_mlp_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="glu"):
        check_settings(ModelConfig(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_scores_the_first_is_best(dtype: torch.dtype) -> None:
    scores = torch.tensor(
        [[0.0, -0.0, 1.0, 1.0, -2.0], [-1.0, -1.0, -1.0, -3.0, -1.0]], dtype=dtype
    )
    assert best(scores, 4).tolist() == [[2, 3, 0, 1], [0, 1, 2, 4]]
    torch.manual_seed(0)
    scores = torch.randn(50, 33, dtype=dtype)
    assert torch.equal(best(scores, 7), scores.topk(7).indices)


class Bare:
    """What a block of transformers reads of its config."""

    def __init__(self, **keys: Any) -> None:
        self.__dict__.update(keys)
        self._experts_implementation = "eager"


SIZES = {
    "hidden_size": DIM, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "intermediate_size": 20, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12,
    "n_shared_experts": 1, "hidden_act": "silu", "mlp_hidden_act": "relu2", "mlp_bias": False,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
    "use_expert_bias": True, "moe_latent_size": 8, "router_jitter_noise": 0.0, "swiglu_limit": 0.1,
}  # fmt: skip
GROUPED = {
    "router": "sigmoid", "bias": True, "groups": 4, "chosen_groups": 2, "scaling": 2.5,
    "shared_dim": 20,
}  # fmt: skip
# Module, class, ours, and what is not as in SIZES.
BLOCKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextSparseMoeBlock", {"shared_dim": 12, "shared_gate": True}, {}),
    "minimax": ("MiniMaxSparseMoeBlock", {}, {}),
    "jamba": ("JambaSparseMoeBlock", {"normalise": False}, {}),
    "granitemoehybrid": ("GraniteMoeHybridMoE", {"of_chosen": True}, {}),
    "kimi_linear": ("KimiLinearMoE", GROUPED, {}),
    "axk2": ("AXK2MoE", {**GROUPED, "other_groups": "zero"}, {}),
    "glm5_next": (
        "Glm5NextTextMoE", {**GROUPED, "activation": "clamped_swiglu", "limit": 0.1}, {},
    ),
    "nemotron_h": (
        "NemotronHMoE", {**GROUPED, "activation": "relu2", "latent": 8, "shared_dim": 12}, {},
    ),
    "lfm2_moe": (
        "Lfm2MoeSparseMoeBlock",
        {"router": "sigmoid", "bias": True, "normalise_eps": 1e-6, "scaling": 2.5}, {},
    ),
}  # fmt: skip


def theirs(family: str) -> nn.Module:
    """Their block, with noise on every parameter and on the bias of the choice."""
    import importlib

    name, _, changes = BLOCKS[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(2)
    block: nn.Module = getattr(module, name)(Bare(**SIZES | changes))
    block = block.float().eval()
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.normal_(std=0.3)
    return block


def pairs(block: nn.Module, ours: nn.Module) -> list[tuple[list[Tensor], Tensor]]:
    """Their parameters, of which the rows one after another are ours."""
    held = dict(block.named_parameters())

    def of(*ends: str) -> list[Tensor]:
        return [p for end in ends for name, p in held.items() if name.endswith(end)]

    routed = "experts.gate_up_proj" if of("experts.gate_up_proj") else "experts.up_proj"
    found = [
        (of("gate.weight" if of("gate.weight") else "router.weight")[:1], ours.router.weight),
        (of(f"{routed}")[:1], ours.up.weight),
        (of("experts.down_proj"), ours.out.weight),
    ]
    if ours.shared is not None:
        ups = [p for n, p in held.items() if "shared" in n and n.endswith("gate_proj.weight")]
        ups += [p for n, p in held.items() if "shared" in n and n.endswith("up_proj.weight")]
        downs = [p for n, p in held.items() if "shared" in n and n.endswith("down_proj.weight")]
        found += [(ups, ours.shared.up.weight), (downs, ours.shared.out.weight)]
        if ours.shared.gate is not None:
            found.append((of("shared_expert_gate.weight"), ours.shared.gate.weight))
    if ours.latent is not None:
        found.append((of("fc1_latent_proj.weight"), ours.latent.down.weight))
        found.append((of("fc2_latent_proj.weight"), ours.latent.out.weight))
    return found


@pytest.mark.parametrize("family", BLOCKS)
def test_outputs_and_gradients_are_those_of_transformers(family: str) -> None:
    """fp32, to 2e-5 of the largest number."""
    block = theirs(family)
    settings = {"experts": 8, "chosen": 3, "dim": 20} | BLOCKS[family][1]
    made = ModelConfig(dim=DIM, mlp_pattern=["experts"], mlps={"experts": settings})
    ours = mlps.make("experts", made, 0)
    assert ours is not None
    with torch.no_grad():
        for given, mine in pairs(block, ours):
            mine.copy_(torch.cat(given))
        for buffer in block.buffers():
            ours.router.choice_bias.copy_(buffer)
    x = torch.randn(1, 50, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    wanted, got = block(xs[0]), ours(xs[1])
    weight = torch.randn_like(got)
    (wanted * weight).sum().backward()
    (got * weight).sum().backward()
    assert near(got, wanted)
    assert near(xs[1].grad, xs[0].grad)
    for given, mine in pairs(block, ours):
        assert near(mine.grad, torch.cat([p.grad for p in given]))


def near(got: Tensor | None, wanted: Tensor | None) -> bool:
    assert got is not None
    assert wanted is not None
    return float((got - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max()))
