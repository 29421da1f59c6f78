"""The recurrences in steps by the Triton kernels, against their definitions."""

from itertools import cycle

import pytest
import torch
import triton

from kernels.recurrences import DiagonalScan, LinearAttention
from tests.kernels.agreement import device_of
from tests.kernels.test_linear_attention import ROWS, tokens
from tests.kernels.test_recurrences import (
    LENGTHS,
    assert_scan_agrees,
    assert_steps_agree,
    linear_reference,
    step_flops,
)

DEVICE = device_of("triton")


@pytest.mark.parametrize(
    ("row", "lengths", "dims"),
    # 20 + 12 columns of a state fill a block of 32; 24 + 20 leave a block that is partly v's.
    list(zip(ROWS, cycle(LENGTHS[::-1]), cycle([(20, 12), (24, 20), (20, 12)]), strict=False)),
)
def test_linear_attention_in_steps(row, lengths, dims, poisoned_memory):
    inputs = tokens(*row, sum(lengths), N=len(lengths), Dk=dims[0], Dv=dims[1], strength=0.1)
    state = inputs.pop("initial_state")
    recurrence = LinearAttention(backend="triton")
    assert_steps_agree(recurrence, inputs, state, lengths, linear_reference, torch.float32, DEVICE)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_diagonal_scan_in_steps(lengths, poisoned_memory):
    assert_scan_agrees(DiagonalScan("triton"), lengths, torch.float32, DEVICE)


@pytest.mark.skipif(DEVICE != "cpu", reason="products are counted in the interpreter")
@pytest.mark.parametrize(
    ("decay", "delta", "most"),
    [("scalar", True, 1.25), ("vector", True, 1.3), ("scalar", False, 1.1)],
)
def test_a_state_that_comes_late_costs_few_more_flops(decay, delta, most, monkeypatch):
    """Products of tiles in all launches, of heads of 64 channels, and two that are no launch."""
    counted = 0
    builder = type(triton.runtime.interpreter.interpreter_builder)
    create_dot = builder.create_dot

    def counting(self, a, b, *rest):
        nonlocal counted
        counted += 2 * a.data.size * b.data.shape[-1]
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", counting)
    inputs = tokens(decay, delta, 64, Hv=1, Dk=64, Dv=64, strength=0.1)
    state = inputs.pop("initial_state").float()
    given = tuple(None if x is None else x.half() for x in inputs.values())
    at_once, late = step_flops(
        LinearAttention(backend="triton"), given, state, given[2], lambda: counted
    )
    outside = 2 * 2 * 64 * 64 * 64  # R S and Rᵀ do, of 64 tokens
    assert 1 < (late + outside) / at_once < most
