"""MLPs that become experts: what a model with experts is before it is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.settings import ConfigError
from parallel import shard
from tests.train.pretrained.shapes import SHAPES, VOCABULARY, export, ids, make
from train.__main__ import main
from train.config import read
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import weights
from train.pretrained.upcycle import Upcycling

pytestmark = pytest.mark.usefixtures("torch_code")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid") / "hf"
    export(make(SHAPES["qwen3_next"]), folder)
    return folder


def upcycled(source: Path, to: Path, *words: str) -> Model:
    assert main(["convert", str(source), "--to", str(to), "--experts", "6", *words]) == 0
    config, held = read(to / "config.yaml"), weights.of_ours(to)
    model = Model(config.model, VOCABULARY, seed=9)
    with torch.no_grad():
        for name, tensor in model.kept_tensors():
            tensor.copy_(held.read(name))
    return model


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model(ids(70), None, shard((70,), "cpu"))


def test_copies_compute_what_the_model_did(hybrid: Path, tmp_path: Path) -> None:
    made = upcycled(hybrid, tmp_path / "made", "--chosen", "3")
    assert set(made.config.mlp_blocks) == {"experts"}
    before = make(SHAPES["qwen3_next"])
    for old, new in zip(before.blocks, made.blocks, strict=True):
        for part in ("up", "out"):
            copies = getattr(new.mlp, part).weight
            assert len(copies) == 6
            assert all(torch.equal(copy, getattr(old.mlp, part).weight) for copy in copies)
    wanted = logits(before)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(logits(made), wanted, rtol=0, atol=1e-5 * scale)


def test_routers_begin_as_those_of_a_new_model(hybrid: Path, tmp_path: Path) -> None:
    made = upcycled(hybrid, tmp_path / "made")
    std = made.config.init_std
    routers = torch.stack([block.mlp.router.weight.detach() for block in made.blocks])
    assert float(routers.std()) == pytest.approx(std, rel=0.1)
    assert len({float(router[0, 0]) for router in routers}) == len(made.blocks)


def test_noise_is_in_units_of_each_matrix_and_the_same_every_time(
    hybrid: Path, tmp_path: Path
) -> None:
    one, two = (upcycled(hybrid, tmp_path / name, "--noise", "0.1") for name in ("one", "two"))
    before = make(SHAPES["qwen3_next"])
    seen = []
    for old, new in zip(before.blocks, one.blocks, strict=True):
        for part in ("up", "out"):
            matrix, copies = (getattr(block.mlp, part).weight.detach() for block in (old, new))
            added = copies - matrix
            assert float(added.std() / matrix.std()) == pytest.approx(0.1, rel=0.05)
            assert not torch.equal(copies[0], copies[1])
            seen.append(float(added[0, 0, 0] / matrix.std()))
    assert len(set(seen)) == len(seen)
    for (name, tensor), (_, other) in zip(one.kept_tensors(), two.kept_tensors(), strict=True):
        assert torch.equal(tensor, other), name


def test_layers_and_mlps_are_converted_together(tmp_path: Path) -> None:
    export(make(SHAPES["llama"]), tmp_path / "hf")
    made = upcycled(tmp_path / "hf", tmp_path / "made", "--pattern", "[liger, attention]")
    assert made.config.blocks == ["liger", "attention"] * 2 + ["liger"]
    assert set(made.config.mlp_blocks) == {"experts"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "convert needs --pattern, for its layers, or --experts, for its MLPs"),
        (["--experts", "0"], "experts is 0"),
        (["--experts", "4", "--chosen", "5"], "chosen is 5; it must be at most experts, 4"),
        (["--experts", "4", "--noise", "nan"], "--noise is nan; it must be from 0 to 1"),
        (["--experts", "4", "--noise", "-1"], "--noise is -1; it must be from 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_line(
    hybrid: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(hybrid), "--to", str(tmp_path / "made"), *words]) == 2
    line = capsys.readouterr().err.strip()
    assert said in line
    assert "\n" not in line
    assert not (tmp_path / "made").exists()


def test_only_mlps_of_one_kind_and_width_become_experts() -> None:
    how = Upcycling(4, 2)
    experts = ModelConfig(mlp_pattern=["swiglu", "experts"])
    with pytest.raises(ConfigError, match="experts of swiglu; the model has 'experts'"):
        how.settings(experts)
    wide = {"wide": {"kind": "swiglu", "dim": 72}, "swiglu": {"dim": 48}}
    with pytest.raises(ConfigError, match=r"of one width; the model has \[48, 72\]"):
        how.settings(ModelConfig(mlp_pattern=["swiglu", "wide"], mlps=wide))
