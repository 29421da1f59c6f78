"""A run that cannot fit is refused before it is made, and one that did not is told in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.settings import ConfigError
from parallel import World
from train import memory
from train.config import read
from train.model.transformer import Model

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    "words",
    [
        ["model.dim=1048576"],
        ["model.mlp_dim=16777216", "model.layers=1024"],
        ["train.batch_tokens=1073741824"],
        ["train.accumulate=65536", "train.batch_tokens=1048576"],
        ["model.pattern=[attention]", "model.mixers.attention={heads: 16384, head_dim: 16384}"],
        ["data.vocab_size=16777216", "model.dim=65536"],
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_made(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"needs more than [\d,]+ GB a machine, and this one has"):
        memory.check(read(SMOKE, words), ALONE, torch.float32)


def test_of_the_weights_a_share_is_counted_under_zero_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four machines of 6 bytes a parameter: 4 + 12 / 4 are needed, and 16 / 4 under stage 3."""
    four = World(0, 4, 0, torch.device("cpu"))
    words = ["train.batch_tokens=256", "train.seq_len=256"]
    count = memory.parameters(read(SMOKE, words))
    monkeypatch.setattr(memory, "memory", lambda: 6 * count)
    memory.check(read(SMOKE, [*words, "zero.stage=3"]), four, torch.float32)
    with pytest.raises(ConfigError, match="GB a machine"):
        memory.check(read(SMOKE, [*words, "zero.stage=2"]), four, torch.float32)


def test_of_experts_to_which_rows_travel_a_share_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four machines of 5 bytes a parameter, where nearly all are in experts: 16 / 4."""
    four = World(0, 4, 0, torch.device("cpu"))
    words = ["train.batch_tokens=256", "train.seq_len=256", "zero.stage=1"]
    words.append("model.mlps.experts={experts: 512, dim: 512}")
    experts = SMOKE.with_name("experts.yaml")
    count = memory.parameters(read(experts, words))
    monkeypatch.setattr(memory, "memory", lambda: 5 * count)
    memory.check(read(experts, [*words, "parallel.experts=rows"]), four, torch.float32)
    with pytest.raises(ConfigError, match="GB a machine"):
        memory.check(read(experts, words), four, torch.float32)


def test_a_run_that_fits_is_not_refused_and_parameters_are_counted() -> None:
    for words in ([], ["model.tie_embeddings=false", "model.pattern=[kda, attention]"]):
        config = read(SMOKE, words)
        memory.check(config, ALONE, torch.float32)
        with torch.device("meta"):
            model = Model(config.model, config.data.vocab_size)
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert memory.parameters(config) == whole - config.model.dim  # but for the last norm


def test_memory_that_is_not_there_is_one_line() -> None:
    for ask in (lambda: np.empty(1 << 50), lambda: torch.empty(1 << 50), lambda: [0] * (1 << 55)):
        with pytest.raises(ConfigError, match="there is not enough memory"), memory.told():
            ask()
    with pytest.raises(RuntimeError, match="else"), memory.told():
        raise RuntimeError("something else")
