"""Which parameter is decayed, by how much it learns, and which of them are Muon's."""

from __future__ import annotations

import pytest

from train.model.config import ModelConfig
from train.model.transformer import Model
from train.optimiser.optim import OptimConfig, parameter_groups

CONFIG = ModelConfig(pattern=["gated_deltanet", "attention"], layers=2, dim=32)


def settings(config: OptimConfig, base: int | None = None) -> dict[str, dict]:
    """The group of every parameter, by name."""
    model = Model(CONFIG, 61) if base is None else Model(_wide(base), 61)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), config, model.lr_multipliers())
    found = {names[id(member)]: group for group in groups for member in group["params"]}
    assert found.keys() == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    return found


def _wide(base: int) -> ModelConfig:
    return ModelConfig(pattern=CONFIG.pattern, layers=2, dim=32, mup_base_dim=base)


def test_matrices_are_decayed_and_nothing_else() -> None:
    for name, group in settings(OptimConfig(weight_decay=0.3)).items():
        matrix = name.endswith(".weight") and "norm" not in name
        assert group["weight_decay"] == (0.3 if matrix else 0.0), name
        assert not group["orthogonal"]


def test_muon_has_the_matrices_inside_the_blocks() -> None:
    for name, group in settings(OptimConfig(name="muon")).items():
        inside = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
        assert group["orthogonal"] == inside, name


@pytest.mark.parametrize(("optimiser", "factor"), [("adamw", 0.25), ("muon", 0.5)])
def test_wider_matrices_learn_slower_and_decay_alike(optimiser: str, factor: float) -> None:
    """Four times as wide as where it was tuned."""
    config = OptimConfig(name=optimiser, weight_decay=0.1)  # type: ignore[arg-type]
    for name, group in settings(config, base=8).items():
        inside = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
        assert group["multiplier"] == (factor if inside else 1.0), name
        if inside:
            assert group["multiplier"] * group["weight_decay"] == pytest.approx(0.1)
