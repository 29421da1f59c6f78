"""The fp32 tensors of a parameter, the weight itself and the optimiser's means: what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WEIGHT = "weight"
MUON = (WEIGHT, "exp_avg")
ADAMW = (WEIGHT, "exp_avg", "exp_avg_sq")

# (parameter, state key, begin, end) -> elements begin to end of the flattened tensor.
Read = Callable[[str, str, int, int], Tensor]
_READ = 1 << 24  # most numbers that are read at a time: 67 MB in fp32


def keys_of(group: dict[str, Any]) -> tuple[str, ...]:
    """What there is of each parameter of a group of the optimiser."""
    return MUON if group["orthogonal"] else ADAMW


def create(state: dict[Any, Any], parameter: Tensor, group: dict[str, Any]) -> None:
    """The optimiser's means of a parameter, as zeros before the first step: a resume fills them."""
    state[parameter]["exp_avg"] = torch.zeros_like(parameter)
    if not group["orthogonal"]:
        state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        state[parameter]["step"] = torch.zeros((), device=parameter.device)


def read_into(part: Tensor, begin: int, read: Callable[[int, int], Tensor]) -> None:
    """Set `part`, flat, which begins with element `begin` of a tensor, from `read(begin, end)`."""
    for a in range(0, part.numel(), _READ):
        b = min(a + _READ, part.numel())
        part[a:b].copy_(read(begin + a, begin + b))
