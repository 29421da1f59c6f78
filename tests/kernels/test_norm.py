"""`rms_norm` against its formula."""

import pytest
import torch
import torch.nn.functional as F

from kernels import rms_norm
from tests.kernels.agreement import BACKENDS, assert_agrees, device_of


def definition(x, weight, gate, eps):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if gate is None else y * F.silu(gate)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5, 63), (2, 33, 2, 65), (7, 1030)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_norm_and_gate_follow_the_formula(backend, dtype, shape, weighted, gated, poisoned_memory):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(shape, dtype=torch.float64),
        "weight": torch.randn(shape[-1], dtype=torch.float64) if weighted else None,
        "gate": torch.randn(shape, dtype=torch.float64) * 3 if gated else None,
    }
    assert_agrees(
        lambda **tensors: rms_norm(**tensors, eps=1e-3, backend=backend),
        lambda **tensors: definition(**tensors, eps=1e-3),
        inputs,
        dtype=dtype,
        device=device_of(backend),
        keep_fp32=["weight"],
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_rows_far_from_one_are_normed_in_fp32(backend, dtype):
    """Squares of these would leave the range of fp16, or lose all digits in bf16."""
    device = device_of(backend)
    x = torch.tensor([[3e4, -3e4], [1e-4, 1e-4], [0, 0]], dtype=torch.float64).to(device, dtype)
    y = rms_norm(x, None, eps=0 if dtype == torch.float64 else 1e-12, backend=backend)
    assert torch.allclose(y[0].double().cpu(), torch.tensor([1.0, -1.0]).double(), atol=1e-2)
    assert torch.allclose(y[1].double().cpu(), torch.ones(2).double(), atol=1e-2)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_strided_inputs_are_read_in_place_of_their_copies(backend, dtype):
    torch.manual_seed(0)
    wide = torch.randn(5, 3, 32, dtype=torch.float64)
    assert_agrees(
        lambda wide: rms_norm(wide[..., :15], None, gate=wide[..., 15:30], backend=backend),
        lambda wide: definition(wide[..., :15], None, wide[..., 15:30], 1e-6),
        {"wide": wide},
        dtype=dtype,
        device=device_of(backend),
    )


def test_rows_of_many_blocks():
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(1500, 300, dtype=torch.float64),
        "weight": torch.randn(300, dtype=torch.float64),
        "gate": torch.randn(1500, 300, dtype=torch.float64),
    }
    assert_agrees(
        rms_norm, lambda **tensors: definition(**tensors, eps=1e-6), inputs, dtype=torch.float64
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.int64), None, None), "floating point"),
        ((torch.zeros(2, 3), torch.zeros(2), None), r"weight must be \(3,\)"),
        ((torch.zeros(2, 3), None, torch.zeros(3)), "gate must have the shape of x"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    x, weight, gate = arguments
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, gate=gate)
