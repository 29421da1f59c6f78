"""Choosing an op's implementation: Triton kernels on a GPU, torch on any device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]


def use_triton(backend: Backend, x: Tensor) -> bool:
    """Whether an op on x runs in Triton.

    "auto" takes Triton for a tensor on a GPU if it is installed, but torch for fp64, in which
    gradients are checked.

    Raises:
        ValueError: backend is none of the three.
    """
    if backend == "auto":
        return x.is_cuda and x.dtype != torch.float64 and find_spec("triton") is not None
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend is {backend!r}; it must be one of auto, triton, torch")
    return backend == "triton"
