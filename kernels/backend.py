"""Choosing an op's implementation: Triton kernels on a GPU, torch on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

_imagined: list[str] = []  # of each `imagining` that is open, innermost last


@contextmanager
def imagining(kind: str) -> Iterator[None]:
    """Inside it ops on meta tensors, which hold no numbers, work as on a device of this kind.

    So it can be seen on any machine which tensors they make there. For "cuda" no kernel is
    launched: it goes with `kernels.triton.launch.launching_nothing`.

    Args:
        kind: "cpu" or "cuda".
    """
    _imagined.append(kind)
    try:
        yield
    finally:
        _imagined.pop()


def device_kind(x: Tensor) -> str:
    """The kind of device that x is on, "cpu" or "cuda"; of a meta tensor the one imagined."""
    return _imagined[-1] if x.is_meta and _imagined else x.device.type


def use_triton(backend: Backend, x: Tensor) -> bool:
    """Whether an op on x runs in Triton.

    "auto" takes Triton for a tensor on a GPU if it is installed, but torch for fp64, in which
    gradients are checked.

    Raises:
        ValueError: backend is none of the three.
    """
    if backend == "auto":
        on_gpu = device_kind(x) == "cuda"
        return on_gpu and x.dtype != torch.float64 and find_spec("triton") is not None
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend is {backend!r}; it must be one of auto, triton, torch")
    return backend == "triton"
