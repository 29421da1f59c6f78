"""A linear layer in parts equals a whole one, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.model.linear import InParts, Linear

IN, OUT = 10, 14
# Runs of outputs, or of inputs, by part; a part may have several, that are not adjacent.
ROWS = {
    "one": [[(0, 4), (4, 9), (9, 14)]],
    "two": [[(0, 1), (4, 6), (9, 10)], [(1, 4), (6, 9), (10, 14)]],
    "three": [[(5, 14)], [(0, 2)], [(2, 5)]],
}
COLUMNS = {"one": [(0, 10)], "two": [(0, 7), (7, 10)], "three": [(4, 10), (0, 1), (1, 4)]}


def layer(bias: bool, frozen: bool = False) -> Linear:
    torch.manual_seed(0)
    return Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(not frozen)


def in_rows(linear: Linear, x: Tensor, parts: list[list[tuple[int, int]]]) -> Tensor:
    passage = InParts(linear, len(parts))
    pieces = {run: y for runs in parts for run, y in zip(runs, passage.rows(x, runs), strict=True)}
    return torch.cat([pieces[run] for run in sorted(pieces)], dim=-1)


def in_columns(linear: Linear, x: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    passage, y = InParts(linear, len(parts)), None
    for a, b in parts:
        y = passage.columns(x[..., a:b], (a, b), y)
    assert y is not None
    return y


def check(got: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(wanted.shape, generator=generator, dtype=wanted.dtype)
    for _ in range(2):  # and backward once more
        ours, theirs = (
            torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (got, wanted)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize("parts", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_give_their_outputs(poisoned_memory, bias: bool, parts: str, T: int) -> None:
    """fp64: to 1e-12, with every gradient."""
    linear, x = layer(bias), torch.randn(1, T, IN, dtype=torch.float64, requires_grad=True)
    check(in_rows(linear, x, ROWS[parts]), linear(x), [x, *linear.parameters()])


@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize("parts", COLUMNS)
def test_columns_add_up(poisoned_memory, parts: str, T: int) -> None:
    """fp64: to 1e-12, with every gradient."""
    linear, x = layer(False), torch.randn(1, T, IN, dtype=torch.float64, requires_grad=True)
    check(in_columns(linear, x, COLUMNS[parts]), linear(x), [x, *linear.parameters()])


def test_a_frozen_layer_passes_gradients_on(poisoned_memory) -> None:
    linear, x = layer(True, frozen=True), torch.randn(3, IN, dtype=torch.float64).requires_grad_()
    check(in_rows(linear, x, ROWS["two"]), linear(x), [x])
    linear = layer(False, frozen=True)
    check(in_columns(linear, x, COLUMNS["two"]), linear(x), [x])


def test_what_needs_no_gradient_gets_none(poisoned_memory) -> None:
    x = torch.randn(3, IN, dtype=torch.float64)
    linear = layer(True)
    check(in_rows(linear, x, ROWS["two"]), linear(x), list(linear.parameters()))
