"""Comparing an op with its plain definition in fp64: outputs, and the gradient of every input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

# Largest error, relative to the largest magnitude of what is compared (at least 1): a few
# roundings of the dtype, sums being fp32.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}

# fp64 stays with torch; products of bf16 are wrong in Triton's interpreter.
BACKENDS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
    pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
]


def device_of(backend: str) -> str:
    """Triton runs in its interpreter on a CPU where there is no GPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


Op = Callable[..., Any]


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, terms: int = 1
) -> None:
    """Compare to the tolerance of the dtype.

    Args:
        terms: each expected number is a sum of so many terms of size 1 and either sign: rounding
            errors add up to those of √terms, however small the sum is.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} for {expected.shape}"
    if not actual.numel():
        return
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    same = actual == expected  # infinities
    error = (actual - expected).masked_fill(same, 0).abs().max()
    size = expected.masked_fill(expected.isinf(), 0).abs().max().clamp(min=terms**0.5)
    assert error <= TOLERANCE[dtype] * size, f"{what}: error {error:.3g} at magnitude {size:.3g}"


def assert_agrees(
    op: Op,
    definition: Op,
    inputs: Mapping[str, Tensor | None],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    keep_fp32: Collection[str] = (),
    rows_used: int | None = None,
    terms: Mapping[str, int] | None = None,
) -> None:
    """Call both with the named fp64 inputs (rounded to `dtype` for the op, fp32 for those in
    `keep_fp32`) and compare outputs and gradients under random cotangents.

    With `rows_used`, rows of the first output from there on must be zero, and their
    cotangents are NaN for the op. `terms` is `assert_close`'s, for gradients by input.
    """
    given: dict[str, Tensor | None] = {}
    exact: dict[str, Tensor | None] = {}
    for name, x in inputs.items():
        if x is None:
            given[name] = exact[name] = None
            continue
        kept = dtype == torch.float64 or name not in keep_fp32
        rounded = x.to(dtype if kept else torch.float32)
        given[name] = rounded.to(device, copy=True).requires_grad_()
        exact[name] = rounded.to("cpu", torch.float64, copy=True).requires_grad_()

    outputs = [y for y in _tuple(op(**given)) if y is not None]
    expected = [y for y in _tuple(definition(**exact)) if y is not None]
    assert len(outputs) == len(expected)
    cotangents = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    poisoned = [c.to(device, copy=True) for c in cotangents]
    if rows_used is not None:
        assert (outputs[0][:, rows_used:] == 0).all()
        cotangents[0][:, rows_used:] = 0
        poisoned[0][:, rows_used:] = float("nan")

    for i, (actual, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(actual, wanted, dtype, f"output {i}")
    names = [name for name, x in given.items() if x is not None]
    # Nothing depends on the inputs where all sequences are empty.
    differentiable = [i for i, y in enumerate(expected) if y.requires_grad]
    wanted_gradients: Sequence[Tensor | None] = [None] * len(names)
    if differentiable:
        wanted_gradients = torch.autograd.grad(
            [expected[i] for i in differentiable],
            [exact[name] for name in names],
            [cotangents[i].double() for i in differentiable],
            allow_unused=True,
        )
    gradients = torch.autograd.grad(outputs, [given[name] for name in names], poisoned)
    for name, actual, wanted in zip(names, gradients, wanted_gradients, strict=True):
        x = given[name]
        assert x is not None
        assert actual.dtype == x.dtype
        zero = torch.zeros(x.shape, dtype=torch.float64)
        assert_close(
            actual, zero if wanted is None else wanted, dtype, f"gradient of {name}",
            (terms or {}).get(name, 1),
        )  # fmt: skip


def bounds(lengths: Collection[int]) -> Tensor:
    """cu_seqlens of sequences with these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
