"""Every shipped config is ready to run, and its model is of the published size."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.settings import ConfigError
from train.config import Config, read
from train.model.config import ModelConfig
from train.model.linear import met
from train.model.transformer import Model, check_settings
from train.pretrained.convert import hybrid

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
SWEEP = [line.split() for line in (ROOT / "configs/study/sweep.txt").read_text().splitlines()]


def model(config: Config) -> Model:
    check_settings(config.model)
    with torch.device("meta"):
        return Model(config.model, config.data.vocab_size)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_pattern_may_count_its_mixers() -> None:
    long = ["gla", "gla", "gla", "attention"]
    assert ModelConfig(pattern=["gla*3", "attention"]).pattern == long
    attentive = ModelConfig(pattern=["attention"], layers=4)
    assert hybrid(attentive, ["liger*3", "attention"]).blocks == ["liger"] * 3 + ["attention"]
    for wrong in ("gla*", "gla*0", "gla*x"):
        with pytest.raises(ConfigError, match="a whole number above 0"):
            ModelConfig(pattern=[wrong])


@pytest.mark.parametrize("file", FILES)
def test_every_config_makes_a_model(file: str) -> None:
    assert size(model(read(ROOT / file))) > 0


def test_the_study_is_six_mixers_at_five_ratios_and_two_sizes() -> None:
    found = set()
    for file, *overrides in SWEEP:
        config = read(ROOT / file, overrides)
        kinds = set(config.model.blocks) - {"attention"}
        full = config.model.blocks.count("attention")
        assert len(kinds) == 1
        assert len(config.model.blocks) == 24
        found.add((config.model.dim, *kinds, full))
        nominal = {1024: 340e6, 2048: 1.3e9}[config.model.dim]
        assert size(model(config)) == pytest.approx(nominal, rel=0.01)
    six = ["hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet"]
    # Of 24 layers 0, 1, 2, 3 or 6 are full: pure, 24:1, 12:1, 6:1, 3:1.
    assert found == set(itertools.product([1024, 2048], six, [0, 1, 2, 3, 6]))
    assert len({read(ROOT / file, rest).run.name for file, *rest in SWEEP}) == len(SWEEP) == 60


def test_the_qwen_recipe_is_qwen3_next_80b_a3b() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = read(ROOT / "configs/recipes/qwen3_next.yaml")
    published = transformers.Qwen3NextConfig(vocab_size=config.data.vocab_size)
    with torch.device("meta"):
        theirs = transformers.Qwen3NextForCausalLM(published)
    assert size(model(config)) == size(theirs)
    # With the published vocabulary, which is larger, it is of the published size.
    whole = model(read(ROOT / "configs/recipes/qwen3_next.yaml", ["data.vocab_size=151936"]))
    assert size(whole) == pytest.approx(80e9, rel=0.01)
    assert sum(met(block) for block in whole.blocks) == pytest.approx(3e9, rel=0.1)


def test_the_kimi_recipe_has_the_published_linear_layers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.kimi_linear import configuration_kimi_linear, modeling_kimi_linear

    ours = model(read(ROOT / "configs/recipes/kimi_linear.yaml")).blocks[0].mixer
    with torch.device("meta"):
        published = configuration_kimi_linear.KimiLinearConfig()
        theirs = modeling_kimi_linear.KimiLinearDeltaAttention(published, layer_idx=0)
    assert size(ours) == size(theirs)


def test_the_kimi_recipe_has_the_published_experts() -> None:
    pytest.importorskip("transformers")
    from transformers.models.kimi_linear import configuration_kimi_linear, modeling_kimi_linear

    first, *others = model(read(ROOT / "configs/recipes/kimi_linear.yaml")).blocks
    published = configuration_kimi_linear.KimiLinearConfig()
    with torch.device("meta"):
        theirs = modeling_kimi_linear.KimiLinearMoE(published)
        dense = modeling_kimi_linear.KimiLinearMLP(published)
    assert size(first.mlp) == size(dense)
    for block in others:
        assert size(block.mlp) == size(theirs)


def test_a_lightning_layer_has_the_published_weights() -> None:
    """At the width of MiniMax-Text-01: 6144, 64 heads of 128."""
    pytest.importorskip("transformers")
    from transformers.models.minimax import MiniMaxConfig, modeling_minimax

    published = MiniMaxConfig(hidden_size=6144, num_attention_heads=64, head_dim=128)
    with torch.device("meta"):
        theirs = modeling_minimax.MiniMaxLightningAttention(published, layer_idx=0)
    wide = ["model.dim=6144", "model.mixers.lightning.heads=64", "model.layers=1"]
    ours = model(read(ROOT / "configs/recipes/minimax_01.yaml", wide)).blocks[0].mixer
    assert size(ours) == size(theirs)
