"""Hybrids made of pretrained Transformers: what stays, what is learned, and training on."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.settings import ConfigError
from data.tokens import tokenizer as tokenizers
from parallel import shard
from tests import tiny
from tests.train.runs import losses
from train.__main__ import main
from train.config import read
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import adopt, weights
from train.pretrained.convert import hybrid
from train.pretrained.distil import divergence

LAYERS = 4
ESSAY = Path(tokenizers.__file__).read_text(encoding="utf-8")[:200]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's file with its text beside it."""
    folder = tmp_path_factory.mktemp("text")
    settings = "train: {batch_tokens: 256, seq_len: 96, steps: 12}"
    return tiny.write(folder / "text.yaml", settings)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, of weights so large that its attention is no average."""
    import transformers

    pieces = tokenizers.train([Path(__file__).read_text(encoding="utf-8")], 560)
    name = {"llama": "Llama", "qwen3": "Qwen3"}[request.param]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=pieces.vocab_size + 8,  # rows that stand for no piece
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    (folder / pieces.file).write_bytes(pieces.model)
    return folder


def convert(pretrained: Path, to: Path, pattern: str, *words: str) -> weights.Tensors:
    assert main(["convert", str(pretrained), "--to", str(to), "--pattern", pattern, *words]) == 0
    return weights.of_ours(to)


def test_liger_is_half_a_gated_recurrence_and_half_a_window() -> None:
    """Token by token, as the paper has it; positions turn the window's half alone."""
    heads, kv_heads, width, window, pool, length = 4, 2, 6, 5, 3, 23
    settings = {"heads": heads, "kv_heads": kv_heads, "head_dim": width, "qk_norm": False}
    settings |= {"output_gate": False, "window": window, "gate_pool": pool}
    torch.manual_seed(0)
    config = ModelConfig(pattern=["liger"], layers=1, dim=16, mixers={"liger": settings})
    mixer = mixers.make("liger", config, 0).double()
    x = torch.randn(1, length, 16, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(x, shard([length], "cpu"))
        projected = x[0] @ mixer.qkv.weight.T
        q, k, v = projected.unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=1)
        rows = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            state = torch.zeros(width, width, dtype=torch.float64)
            column = []
            for t in range(length):
                pooled = k[t, g].reshape(-1, pool).mean(-1).repeat_interleave(pool)
                gate = torch.sigmoid(pooled) ** (1 / 16)
                state = gate[:, None] * state + torch.outer(k[t, g].softmax(-1), v[t, g])
                near = range(max(0, t - window + 1), t + 1)
                scores = torch.stack([turned(q[t, h], t) @ turned(k[s, g], s) for s in near])
                chances = (scores / math.sqrt(width)).softmax(-1)
                soft = chances @ torch.stack([v[s, g] for s in near])
                column.append((state.T @ q[t, h].softmax(-1) + soft) / 2)
            rows.append(torch.stack(column))
        wanted = torch.stack(rows, dim=1).flatten(1) @ mixer.out.weight.T
    torch.testing.assert_close(got[0], wanted, rtol=0, atol=1e-9)


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head, as complex numbers."""
    half = len(x) // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    spun = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angles)
    return torch.cat([spun.real, spun.imag])


def test_liger_has_every_bit_of_the_model_and_nothing_more(
    pretrained: Path, tmp_path: Path
) -> None:
    adopt.adopt(pretrained, tmp_path / "plain", print)
    plain = weights.of_ours(tmp_path / "plain")
    made = convert(pretrained, tmp_path / "made", "[liger, liger, liger, attention]")
    assert made.names == plain.names
    assert all(torch.equal(made.read(name), plain.read(name)) for name in plain.names)
    config = read(tmp_path / "made" / "config.yaml").model
    assert config.blocks == ["liger", "liger", "liger", "attention"]
    before = read(tmp_path / "plain" / "config.yaml").model
    (_, attention), (_, liger) = (
        mixers.resolve(name, one) for name, one in (("attention", before), ("liger", config))
    )
    for key in ("heads", "kv_heads", "head_dim", "rotary_theta", "qk_norm", "output_gate"):
        assert getattr(liger, key) == getattr(attention, key)
    assert liger.window == 64
    assert mixers.resolve("attention", config)[1] == attention


def test_hedgehog_learns_the_weights_of_attention(
    pretrained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = convert(
        pretrained,
        tmp_path / "made",
        "[hedgehog, attention]",
        *("--text", str(text), "--steps", "40", "--lr", "0.03"),
    )
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    assert [line.split(":")[0] for line in found] == ["layer 0", "layer 2"]
    for line in found:
        before, after = (float(word) for word in re.findall(r"\d\.\d+", line))
        assert after < 0.85 * before, line

    adopt.adopt(pretrained, tmp_path / "plain", print)
    plain = weights.of_ours(tmp_path / "plain")
    maps = {f"blocks.{n}.mixer.{which}_map" for n in (0, 2) for which in "qk"}
    assert made.names == plain.names | maps
    assert all(torch.equal(made.read(name), plain.read(name)) for name in plain.names)
    for name in maps:
        assert not torch.allclose(made.read(name), torch.eye(8).expand(4, 8, 8), atol=0.05)
    # What comes out of the layer is nearer to what comes out of the attention layer, too.
    ids = torch.tensor(tokenizers.load(pretrained / "tokenizer.model").encode(ESSAY))
    config = read(tmp_path / "made" / "config.yaml").model
    attention, learned, unlearned = (
        first_mixing(config, name, held, ids)
        for name, held in (("attention", plain), ("hedgehog", made), ("hedgehog", plain))
    )
    assert (learned - attention).norm() < 0.9 * (unlearned - attention).norm()


def first_mixing(config: ModelConfig, name: str, held: weights.Tensors, ids: Tensor) -> Tensor:
    """What the first layer's mixer gives if it is `name`, with what weights there are."""
    block = Model(dataclasses.replace(config, pattern=[name]), 8).blocks[0]
    with torch.no_grad():
        for label, parameter in block.named_parameters():
            if f"blocks.0.{label}" in held:
                parameter.copy_(held.read(f"blocks.0.{label}"))
        x = block.mixer_norm(held.read("embedding.weight")[ids].unsqueeze(0))
        return block.mixer(x, shard([len(ids)], "cpu"))


def test_divergence_is_that_of_the_weights_written_out() -> None:
    settings = {"heads": 2, "kv_heads": 1, "head_dim": 6, "qk_norm": False, "output_gate": False}
    config = ModelConfig(
        pattern=["hedgehog"], layers=1, dim=16, init_std=0.7, mixers={"hedgehog": settings}
    )
    torch.manual_seed(0)
    student: Any = Model(config, 11).blocks[0].mixer.double()
    x, lengths = torch.randn(1, 12, 16, dtype=torch.float64), [1, 7, 4]
    here = shard(lengths, "cpu")
    with torch.no_grad():
        student.q_map.add_(0.1 * torch.randn(2, 6, 6))
        q, k, _ = student.project(x, here)
    found = list(divergence(student, x, here))
    start = 0
    for length, got in zip(lengths, found, strict=True):
        wanted = 0.0
        for h in range(2):
            for i in range(start, start + length):
                seen = range(start, i + 1)
                a = torch.stack([q[0, i, h] @ k[0, j, 0] / math.sqrt(6) for j in seen]).softmax(0)
                phi = feature(student.q_map[h] @ q[0, i, h])
                w = torch.stack([phi @ feature(student.k_map[h] @ k[0, j, 0]) for j in seen])
                w = w / w.sum()
                wanted += float((a * (a / w).log()).sum())
        assert float(got) == pytest.approx(wanted, abs=1e-9)
        start += length


def feature(y: Tensor) -> Tensor:
    return torch.cat([2 * y, -2 * y]).softmax(0)


def test_training_goes_on_from_a_hybrid(
    pretrained: Path, text: Path, tmp_path: Path, world: None
) -> None:
    made = tmp_path / "made"
    words = ["--text", str(text), "--steps", "2"]
    convert(pretrained, made, "[liger, hedgehog, attention]", *words)
    there = read(text)
    words = [f"data.{key}={getattr(there.data, key)}" for key in ("source", "root", "validation")]
    words += [f"train.{key}={getattr(there.train, key)}" for key in ("batch_tokens", "seq_len")]
    words += ["train.steps=12", "optim.warmup_steps=2", "eval.sample_tokens=0", "eval.tokens=1024"]
    assert main([str(made / "config.yaml"), f"run.root={tmp_path}/runs", *words]) == 0
    run = tmp_path / "runs" / "made"
    steps = losses(run)
    assert steps[12] < steps[1] - 0.5
    assert "embedding.weight: 8 rows" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (["gla", "attention"], "--pattern names 'gla' where the model has 'attention'"),
        ([], "--pattern is empty"),
        (["liger", "local"], "'local'"),
    ],
)
def test_what_a_layer_cannot_become_is_said(pattern: list[str], said: str) -> None:
    config = ModelConfig(pattern=["attention"], layers=LAYERS)
    with pytest.raises(ConfigError) as error:
        hybrid(config, pattern)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"window": 7}, {"conv_size": 4}])
def test_a_layer_with_a_window_or_a_convolution_is_left_alone(change: dict[str, int]) -> None:
    local = {"kind": "attention", **change}
    config = ModelConfig(pattern=["local", "attention"], layers=LAYERS, mixers={"local": local})
    assert hybrid(config, ["local", "liger"]).blocks == ["local", "liger"] * 2
    with pytest.raises(ConfigError, match="only attention without a window"):
        hybrid(config, ["liger", "attention"])


def test_hedgehog_without_a_text_is_refused(pretrained: Path, tmp_path: Path) -> None:
    words = ["convert", str(pretrained), "--to", str(tmp_path / "made")]
    assert main([*words, "--pattern", "hedgehog"]) == 2
    assert not (tmp_path / "made").exists()
