"""Every mixer there is a file for: what a block and a run expect of it.

A new file is tested by being there. Models are fp64, so agreement is to 1e-9.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.settings import ConfigError
from parallel import World, distribute, shard
from tests.streams import streams
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Cache, Model

VOCABULARY = 31
# Small values of settings by their names, for every mixer that has them.
TINY = {
    "heads": 2,
    "kv_heads": 1,
    "value_heads": 4,
    "head_dim": 8,
    "value_head_dim": 6,
    "state_dim": 10,
    "rank": 3,
    "gate_rank": 3,
    "block": 5,
}
# What the defaults leave out.
OPTIONS: dict[str, dict[str, Any]] = {
    "attention-window": {"window": 5, "rotary_fraction": 0.5, "qk_norm_over": "heads"},
    "attention-nope": {"rotary_fraction": 0.0, "output_gate": False, "qkv_bias": True},
    "attention-conv": {"conv_size": 4},
    "liger": {"window": 5, "gate_pool": 2},
    "deltanet-gate": {"output_gate": True, "negative_eigenvalues": True},
    "gated_deltanet-bare": {"conv_size": 0, "negative_eigenvalues": True},
    "linear_attention-sum": {"output_norm": "sum", "feature_map": "softmax"},
    "linear_attention-zeros": {"output_norm": "sum", "feature_map": "relu"},
    "mamba2-groups": {"groups": 2, "heads": 4},
}
KINDS = list(dict.fromkeys([*mixers.names(), *OPTIONS]))
GROWING = {"attention", "attention-nope", "attention-conv"}  # their cache holds every token


def config(kind: str, **changes: Any) -> ModelConfig:
    """Two blocks of one mixer: settings may depend on the depth."""
    name = kind.partition("-")[0]
    module, _ = mixers.resolve(name, ModelConfig(pattern=[name]))
    known = {field.name for field in dataclasses.fields(module.Config)}
    settings = {key: value for key, value in TINY.items() if key in known}
    return ModelConfig(
        pattern=[name],
        layers=2,
        dim=16,
        # Larger weights than a fresh model's, so that every part has its say.
        init_std=0.3,
        mixers={name: settings | OPTIONS.get(kind, {})},
        **changes,
    )


def make(kind: str) -> Model:
    torch.manual_seed(1)
    return Model(config(kind), VOCABULARY).double()


def tokens(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))


def logits(model: Model, ids: Tensor, *lengths: int) -> Tensor:
    with torch.no_grad():
        return model(ids, None, shard(lengths, "cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_as_if_alone(kind: str) -> None:
    model, lengths = make(kind), (1, 33, 2, 67, 3)
    ids = tokens(sum(lengths))
    packed = logits(model, ids, *lengths)
    for alone, part in zip(ids.split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(part, logits(model, alone, len(alone)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_no_earlier_output(kind: str) -> None:
    model, ids = make(kind), tokens(70)
    changed = ids.clone()
    changed[40] = (changed[40] + 1) % VOCABULARY
    before, after = logits(model, ids, 70), logits(model, changed, 70)
    assert torch.equal(before[:40], after[:40])
    assert not torch.allclose(before[40:], after[40:])
    assert not torch.allclose(before[41], after[41])  # the next token knows of it


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_by_pieces_gives_the_logits_of_one_forward(kind: str) -> None:
    """Prefill in chunks, then one token at a time, then a piece; the state does not grow."""
    model, ids = make(kind), tokens(70)
    whole = logits(model, ids, 70)
    cache, seen, parts, sizes = model.new_cache(), 0, [], []
    with torch.no_grad():
        for size in (1, 32, 17, *[1] * 16, 4):
            here = shard([size], "cpu", start=seen)
            parts.append(model(ids[seen : seen + size], None, here, cache))
            seen += size
            sizes.append(elements(cache))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)
    assert (sizes[1] == sizes[-1]) == (kind not in GROWING)


def elements(cache: Cache) -> int:
    return sum(part.numel() for block in cache for part in block.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    model = make(kind)
    (stream,) = streams([[1, 40, 9]], VOCABULARY)
    loss, _ = model(*distribute(*stream, World(0, 1, 0, torch.device("cpu"))))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gives_the_loss_of_fp64(kind: str) -> None:
    """To 2 %, with every gradient there and finite."""
    ids = tokens(70)
    losses = []
    for dtype in (torch.float64, torch.bfloat16):
        model = make(kind).to(dtype)
        assert logits(model, ids, 70).dtype == dtype
        loss, _ = model(ids, ids.roll(-1), shard([70], "cpu"))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_counted_sequence_by_sequence(kind: str) -> None:
    mixer = make(kind).blocks[0].mixer
    assert mixer.mixing_flops([3, 64]) > 0
    assert mixer.mixing_flops(np.array([3, 64])) == pytest.approx(
        mixer.mixing_flops([3]) + mixer.mixing_flops([64])
    )


@pytest.mark.parametrize("name", mixers.names())
def test_a_wrong_setting_is_named_on_one_line(name: str) -> None:
    module, filled = mixers.resolve(name, ModelConfig(pattern=[name]))
    for field in dataclasses.fields(module.Config):
        assert field.metadata["help"], field.name
        wrong: list[Any] = ["nonsense"]
        if type(getattr(filled, field.name)) is int:
            wrong.append(-1)
        for value in wrong:
            with pytest.raises(ConfigError) as error:
                mixers.check(ModelConfig(pattern=[name], mixers={name: {field.name: value}}))
            message = str(error.value)
            assert "\n" not in message
            assert f"model.mixers.{name}" in message
            assert field.name in message
            assert str(value) in message


def test_a_sum_needs_features_that_are_not_negative() -> None:
    settings = {"output_norm": "sum", "feature_map": "silu"}
    with pytest.raises(ConfigError, match="output_norm is sum"):
        mixers.check(
            ModelConfig(pattern=["linear_attention"], mixers={"linear_attention": settings})
        )


NEWCOMER = """
from dataclasses import dataclass
from train.model.mixers._parts import Heads, LinearMixer, recur

@dataclass
class Config(Heads):
    pass

class Mixer(LinearMixer):
    def forward(self, x, shard, cache=None):
        q, k, v = self.project(x, shard, cache)
        return self.out(recur(q, k, v, None, None, shard, cache).flatten(-2))
"""


def test_a_new_file_is_a_new_mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newcomer.py").write_text(NEWCOMER, encoding="utf-8")
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
    assert "newcomer" in mixers.names()
    model = make("newcomer")
    assert logits(model, tokens(5), 5).shape == (5, VOCABULARY)


STREAMS = [[67], [3, 1, 2, 40, 1, 7, 5, 2], [5]]


def shared(world: World, alone: dict[str, list[dict[str, Tensor]]]) -> dict[str, float]:
    """On each rank: the largest error of loss and gradients against those of one rank."""
    errors = {}
    for kind, wanted in alone.items():
        error = 0.0
        for stream, each in zip(streams(STREAMS, VOCABULARY), wanted, strict=True):
            here = gradients(kind, world, stream)
            summed = world.sum(torch.cat([here[name].flatten() for name in each]))
            for found, gradient in zip(
                summed.split([gradient.numel() for gradient in each.values()]),
                each.values(),
                strict=True,
            ):
                scale = max(1.0, float(gradient.abs().max()))
                error = max(error, float((found - gradient.flatten()).abs().max()) / scale)
        errors[kind] = error
    return errors


def gradients(kind: str, world: World, stream: Any) -> dict[str, Tensor]:
    model = make(kind)
    loss, _ = model(*distribute(*stream, world))
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach()} | {n: g for n, g in found.items() if g is not None}


def test_several_ranks_give_the_gradients_of_one(ranks) -> None:
    one = World(0, 1, 0, torch.device("cpu"))
    alone = {
        kind: [gradients(kind, one, s) for s in streams(STREAMS, VOCABULARY)] for kind in KINDS
    }
    for errors in ranks(3).run(shared, alone):
        assert list(errors) == list(KINDS)
        assert max(errors.values()) < 1e-9, errors


def one_of_each() -> Model:
    """A block of every mixer, each computed again in the backward pass."""
    each = [config(name) for name in mixers.names()]
    settings = {name: given for one in each for name, given in one.mixers.items()}
    torch.manual_seed(1)
    return Model(
        ModelConfig(
            pattern=mixers.names(),
            layers=len(each),
            dim=16,
            init_std=0.1,
            checkpoint_activations=True,
            mixers=settings,
        ),
        VOCABULARY,
    )


def sharded(world: World) -> dict[str, Tensor]:
    """Gradients of the mean loss with parameters, gradients and moments dealt over the ranks."""
    from deepspeed.utils import safe_get_full_grad

    from train.config import ZeroConfig
    from train.engine import Engine
    from train.optimiser.optim import OptimConfig

    engine = Engine(one_of_each(), OptimConfig(), ZeroConfig(stage=3), world, torch.float32, 1)
    (stream,) = streams([[67, 5, 30]], VOCABULARY)
    loss, _ = engine(*distribute(*stream, world))
    engine.backward(loss * (world.size / (stream.labels >= 0).sum()))
    return {name: safe_get_full_grad(p).clone() for p, name in engine.names.items()}


def test_all_mixers_train_under_zero_3(ranks) -> None:
    """fp32: each gradient to 1e-4 of its largest number."""
    (stream,) = streams([[67, 5, 30]], VOCABULARY)
    model = one_of_each()
    loss, _ = model(*distribute(*stream, World(0, 1, 0, torch.device("cpu"))))
    (loss / (stream.labels >= 0).sum()).backward()
    for found in ranks(3).run(sharded):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            error = (found[name].reshape(parameter.shape) - parameter.grad).abs().max()
            assert error < 1e-4 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("name", ["attention", "hedgehog", "liger"])
def test_rotary_turns_whole_pairs_of_a_head_of_any_width(name: str) -> None:
    for head_dim, turned in ((1, 0), (2, 2), (3, 2), (7, 6), (8, 8)):
        settings = {name: {"heads": 1, "head_dim": head_dim}}
        mixer = mixers.make(name, ModelConfig(pattern=[name], dim=8, mixers=settings), 0)
        assert mixer.rotary_dim == turned
