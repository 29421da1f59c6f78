"""AdamW or Muon, what is decayed, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from data.settings import setting

if TYPE_CHECKING:
    from torch import nn


@dataclass
class OptimConfig:
    name: Literal["adamw", "muon"] = setting(
        "adamw", "muon: matrices inside the blocks by Muon, everything else by AdamW"
    )
    lr: float = setting(3e-3, "peak learning rate; 0 only evaluates", least=0, most=1e6)
    schedule: Literal["wsd", "cosine"] = setting("wsd", "shape of the learning rate after warm-up")
    warmup_steps: int = setting(20, "steps of linear warm-up", least=0)
    decay_fraction: float = setting(
        0.2, "wsd: the last share of the steps, in which it decays", least=0, most=1
    )
    min_lr_fraction: float = setting(
        0.0, "learning rate at the end, as a share of the peak", least=0, most=1
    )
    beta1: float = setting(0.9, "AdamW: decay of the mean of gradients", least=0, below=1)
    beta2: float = setting(0.95, "AdamW: decay of the mean of squared gradients", least=0, below=1)
    # Of 0, a weight without gradients, a piece never seen, would become 0 / 0.
    eps: float = setting(1e-8, "AdamW: epsilon", least=1e-30, most=1)
    momentum: float = setting(0.95, "Muon: decay of the mean of gradients", least=0, below=1)
    weight_decay: float = setting(
        0.1, "decoupled decay of matrices; vectors have none", least=0, most=1e6
    )
    clip: float = setting(1.0, "largest gradient norm; 0 for no clipping", least=0)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` of `steps`, counted from 0: a function, no state.

    Warm-up is linear. WSD (Hu et al. 2024, arXiv 2404.06395) then stays at the peak and
    falls linearly over the last `decay_fraction`; cosine falls from the peak on.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "wsd":
        falling = config.decay_fraction * steps
        left = min(1.0, (steps - step) / falling) if falling else 1.0
    else:
        left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return config.lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * left)


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix, or a stack of them: experts'."""
    return len(shape) in (2, 3) and name.endswith(".weight")


def is_orthogonal(name: str, shape: Sequence[int], config: OptimConfig) -> bool:
    """Whether a parameter takes Muon's step."""
    return config.name == "muon" and _is_matrix(name, shape) and name.startswith("blocks.")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    multipliers: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Parameters by what the optimiser does with them.

    Matrices are decayed, everything else (norms, biases, decays, filters) is not. Muon is for
    the matrices inside the blocks; embedding and head are tables of vectors.

    Args:
        multipliers: factors on the learning rate, by name; 1 where there is none.

    Returns:
        Groups for the optimiser, with `multiplier` and `orthogonal` besides its own keys.
    """
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        matrix = _is_matrix(name, parameter.shape)
        orthogonal = is_orthogonal(name, parameter.shape, config)
        multiplier = multipliers.get(name, 1.0)
        if orthogonal:
            # An orthogonal update's spectral norm grows with the root of the width alone
            # (Yang et al. 2023, arXiv 2310.17813), AdamW's with the width.
            multiplier **= 0.5
        groups.setdefault((orthogonal, matrix, multiplier), []).append(parameter)
    return [
        {
            "params": members,
            # Decay is lr · weight_decay: the same at any width.
            "weight_decay": config.weight_decay / multiplier if matrix else 0.0,
            "orthogonal": orthogonal,
            "multiplier": multiplier,
        }
        for (orthogonal, matrix, multiplier), members in groups.items()
    ]
