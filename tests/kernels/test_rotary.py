"""`rotary_embedding` against multiplication by a complex number of length one."""

import pytest
import torch

from kernels import rotary_embedding
from tests.kernels.agreement import BACKENDS, assert_agrees, assert_close, device_of


def definition(x, positions, theta, R):
    frequencies = theta ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    angles = positions.double()[..., None, None] * frequencies
    turned = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag, x[..., R:]], -1)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 3, 65])
@pytest.mark.parametrize(("D", "R"), [(8, 8), (12, 6), (10, 2)])
@pytest.mark.parametrize("batched", [True, False])
def test_pairs_of_channels_turn_with_the_position(
    backend, dtype, T, D, R, batched, poisoned_memory
):
    torch.manual_seed(0)
    device = device_of(backend)
    positions = torch.randint(0, 60, (2, T) if batched else (T,)).to(device)
    assert_agrees(
        lambda x: rotary_embedding(x, positions, theta=500.0, rotary_dim=R, backend=backend),
        lambda x: definition(x, positions.cpu(), 500.0, R),
        {"x": torch.randn(2, T, 3, D, dtype=torch.float64)},
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_scores_depend_on_the_distance_alone_however_far(backend, dtype):
    torch.manual_seed(0)
    device = device_of(backend)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).to(device, dtype).unbind()

    def score(i, j):
        turned = [
            rotary_embedding(x, torch.tensor([t], device=device), backend=backend).double()
            for x, t in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    assert_close(score(100_000, 99_990), score(10, 0).cpu(), dtype, "score")


def test_position_zero_and_width_zero_change_nothing():
    x = torch.randn(1, 4, 2, 6)
    assert torch.equal(rotary_embedding(x, torch.zeros(4, dtype=torch.int64)), x)
    assert torch.equal(rotary_embedding(x, torch.arange(4), rotary_dim=0), x)


@pytest.mark.parametrize(
    ("positions", "rotary_dim", "message"),
    [
        (torch.arange(3), None, "positions must be"),
        (torch.zeros(4), None, "positions must be"),
        (torch.arange(4), 3, "rotary_dim is 3"),
        (torch.arange(4), 8, "rotary_dim is 8"),
    ],
)
def test_arguments_that_do_not_fit_are_named(positions, rotary_dim, message):
    with pytest.raises(ValueError, match=message):
        rotary_embedding(torch.zeros(1, 4, 2, 6), positions, rotary_dim=rotary_dim)
