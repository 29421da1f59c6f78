"""First values: a function of seed, name and position, with the distributions that are promised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from train.model import mixers
from train.model.config import ModelConfig
from train.model.initial import Constant, Identity, Normal, Stream, Uniform, declared, fill, values
from train.model.transformer import Model, place

FIRSTS = [Normal(0.3), Uniform(-2, 5), Uniform(1, 16, then=torch.log), Constant(0.25), Identity(7)]
LENGTH = 300_007  # over two blocks, divisible by nothing


@pytest.mark.parametrize("first", FIRSTS, ids=lambda first: type(first).__name__)
def test_any_part_is_that_part_of_the_whole(first: Any) -> None:
    whole = values(first, 3, "a.weight", 0, LENGTH)
    rng = np.random.default_rng(0)
    cuts = [(0, 0), (0, 1), (1, 9), (7, 8), (LENGTH - 3, LENGTH), (131_071, 131_075)]
    for begin, end in [*cuts, *np.sort(rng.integers(0, LENGTH, (20, 2)), axis=1).tolist()]:
        assert torch.equal(values(first, 3, "a.weight", begin, end), whole[begin:end])


def test_numbers_are_those_of_philox_in_order() -> None:
    """numpy's own generator, read from the start: each 64 bits are two numbers, low half first."""
    stream = Stream(5, "b")
    raw = np.random.Philox(key=stream._key).random_raw(50_000)
    halves = np.stack([raw & 0xFFFFFFFF, raw >> 32], axis=1).astype(np.uint32).ravel()
    wanted = ((halves.view(np.int32) >> 8) + 0.5) / 2**23
    got = stream.uniform(12_345, 100_000).double().numpy()
    assert np.array_equal(got, wanted[12_345:])
    assert abs(wanted).max() < 1


def test_another_seed_or_name_gives_other_numbers() -> None:
    drawn = [
        values(Normal(1), seed, name, 0, 50_000)
        for seed, name in [(0, "a"), (1, "a"), (0, "b"), (-1, "a"), (10, "a")]
    ]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlation.abs().max() < 0.03


def test_distributions_are_what_they_say() -> None:
    """Kolmogorov and Smirnov's distance to the distribution function, below its 0.1 % point."""
    n = 400_000
    limit = 1.95 / math.sqrt(n)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    normal = values(Normal(0.02), 0, "w", 0, n).double().sort().values
    assert ((1 + torch.erf(normal / 0.02 / math.sqrt(2))) / 2 - steps).abs().max() < limit
    uniform = values(Uniform(-3, 1), 0, "w", 0, n).double().sort().values
    assert ((uniform + 3) / 4 - steps).abs().max() < limit
    assert torch.equal(
        values(Identity(5), 0, "w", 0, 75).view(3, 5, 5), torch.eye(5).expand(3, 5, 5)
    )


HEADS = {"heads": 2, "head_dim": 16}
LAYERS, DIM, STD = 4, 96, 0.05


def model(name: str, **more: Any) -> Model:
    settings = HEADS | ({"conv_size": 4} if name == "gla" else {})
    settings = {"state_dim": 32} if name == "hgrn" else settings
    config = ModelConfig(
        pattern=[name], layers=LAYERS, dim=DIM, init_std=STD, mixers={name: settings}, **more
    )
    return Model(config, 200, seed=7)


@pytest.mark.parametrize("name", mixers.names())
def test_matrices_are_normal_and_vectors_as_their_papers_say(name: str) -> None:
    """By the shape and the role of each parameter, written down anew."""
    for label, parameter in model(name).named_parameters():
        whole, last = parameter.detach(), label.split(".")[-1]
        if last == "A_log":
            slowest = 1e-3 if name == "gated_deltanet" else 1
            assert ((whole.exp() >= slowest) & (whole.exp() <= 16)).all()
            assert whole.unique().numel() == whole.numel()
        elif last == "dt_bias":
            step = F.softplus(whole)
            assert ((step > 0.99e-3) & (step < 0.1001)).all()
        elif last == "conv":
            bound = whole.shape[1] ** -0.5
            assert whole.abs().max() <= bound
            assert whole.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        elif last in ("q_map", "k_map"):
            assert torch.equal(whole, torch.eye(16).expand(2, 16, 16))
        elif last == "bound":
            layer = int(label.split(".")[1])
            torch.testing.assert_close(whole.sigmoid(), torch.full_like(whole, layer / LAYERS))
        elif whole.dim() == 2:
            std = STD / (2 * LAYERS) ** 0.5 if ".out." in label else STD
            error = 5 / (2 * whole.numel()) ** 0.5
            assert whole.std() == pytest.approx(std, rel=error), label
            assert abs(whole.mean()) < 5 * std / whole.numel() ** 0.5
        elif "bias" in last:
            assert torch.equal(whole, torch.zeros_like(whole))
        else:  # norms, and Mamba-2's D
            assert torch.equal(whole, torch.ones_like(whole)), label


def test_a_parameter_does_not_depend_on_what_else_the_model_has() -> None:
    two, other = model("gla"), model("kda", mlp_dim=64)
    of_two, of_other = dict(two.named_parameters()), dict(other.named_parameters())
    same = [name for name in of_two if "qkv" in name] + ["embedding.weight"]
    assert len(same) == LAYERS + 1
    assert all(torch.equal(of_two[name], of_other[name]) for name in same)


class Stacked(nn.Module):
    """An MLP of experts, which no rule here knows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 64, dim))
        self.out = nn.Parameter(torch.empty(3, dim, 64))
        self.register_buffer("choice_bias", torch.ones(3))


def test_stacked_matrices_get_values_without_a_word() -> None:
    made = model("gla")
    made.blocks[1].mlp = Stacked(DIM)
    fill(made, made._firsts(), 7)
    found = made.blocks[1].mlp
    assert float(found.up.std().detach()) == pytest.approx(STD, rel=0.03)
    assert float(found.out.std().detach()) == pytest.approx(STD / (2 * LAYERS) ** 0.5, rel=0.03)
    assert not found.choice_bias.any()


def test_a_vector_that_declares_nothing_is_refused() -> None:
    """On `meta` the ones of its module would be lost without a word."""
    made = model("gla")
    made.blocks[0].mlp.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(TypeError, match=r"blocks\.0\.mlp\.scale must declare"):
        made._firsts()


def test_new_tensors_in_the_place_of_others_stay_shared() -> None:
    made = model("gla", tie_embeddings=True)
    made.blocks[0].mlp = Stacked(DIM)
    names = []

    def zeros(name: str, old: torch.Tensor) -> torch.Tensor:
        names.append(name)
        return torch.zeros(old.shape)

    wanted = [name for name, _ in [*made.named_parameters(), *made.named_buffers()]]
    made.embedding.weight.requires_grad_(False)
    place(made, zeros)
    assert sorted(names) == sorted(wanted)
    assert made.head.weight is made.embedding.weight
    assert not made.head.weight.requires_grad
    assert made.norm.weight.requires_grad
    assert not any(tensor.any() for tensor in made.state_dict().values())


def test_a_module_by_itself_begins_as_it_declares() -> None:
    assert torch.equal(declared(Constant(1), 3).detach(), torch.ones(3))
