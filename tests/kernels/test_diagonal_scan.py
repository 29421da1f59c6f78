"""`diagonal_scan` against the recurrence, one token after the other."""

from itertools import pairwise

import pytest
import torch

from kernels import diagonal_scan
from tests.kernels.agreement import BACKENDS, assert_agrees, bounds, device_of

SEQUENCES = {
    "one of 0": [0],
    "one of 1": [1],
    "one of 3": [3],
    "one of 63": [63],
    "one of 65": [65],
    "mixed": [0, 0, 2, 1, 33, 0, 47, 0],
    "none": [],
}
# Strength of the decay, D, with an initial state.
USUAL = (1.0, 3, True)
DECAYS = [(0.01, 2, False), (20.0, 2, True), (1e4, 2, True)]


def definition(x, decay, initial_state, cu_seqlens):
    D = x.shape[2]
    rows, final = [x.new_zeros(0, D)], [x.new_zeros(0, D)]
    for n, (start, end) in enumerate(pairwise(cu_seqlens)):
        h = x.new_zeros(D) if initial_state is None else initial_state[n]
        for t in range(int(start), int(end)):
            h = decay[0, t].exp() * h + x[0, t]
            rows.append(h[None])
        final.append(h[None])
    rows.append(x.new_zeros(x.shape[1] - int(cu_seqlens[-1]), D))
    return torch.cat(rows)[None], torch.cat(final)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "decays"),
    [(lengths, USUAL) for lengths in SEQUENCES.values()]
    + [(SEQUENCES["mixed"], decays) for decays in DECAYS],
)
def test_scans_each_sequence_alone(backend, dtype, lengths, decays, poisoned_memory):
    strength, D, state = decays
    torch.manual_seed(0)
    cu_seqlens = bounds(lengths)
    used = int(cu_seqlens[-1])
    x = torch.randn(1, used + 3, D, dtype=torch.float64)
    decay = -strength * torch.rand(1, used + 3, D, dtype=torch.float64)
    decay[:, : used // 3] = 0  # a state that is only added to
    x[:, used:] = float("nan")
    decay[:, used:] = float("nan")
    device = device_of(backend)

    def op(**tensors):
        return diagonal_scan(
            **tensors,
            output_final_state=True,
            cu_seqlens=cu_seqlens.to(device),
            backend=backend,
        )

    assert_agrees(
        op,
        lambda **tensors: definition(**tensors, cu_seqlens=cu_seqlens),
        {
            "x": x,
            "decay": decay,
            "initial_state": torch.randn(len(lengths), D, dtype=torch.float64) if state else None,
        },
        dtype=dtype,
        device=device,
        keep_fp32=["decay", "initial_state"],
        rows_used=used,
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 3, 33])
def test_batch_rows_are_sequences(backend, dtype, T, poisoned_memory):
    torch.manual_seed(0)

    def plain(x, decay, initial_state):
        rows = (y.reshape(1, -1, 2) for y in (x, decay))
        h, final = definition(*rows, initial_state, bounds([T] * 3))
        return h.view(x.shape), final

    assert_agrees(
        lambda **tensors: diagonal_scan(**tensors, output_final_state=True, backend=backend),
        plain,
        {
            "x": torch.randn(3, T, 2, dtype=torch.float64),
            "decay": -torch.rand(3, T, 2, dtype=torch.float64),
            "initial_state": torch.randn(3, 2, dtype=torch.float64),
        },
        dtype=dtype,
        device=device_of(backend),
        keep_fp32=["decay", "initial_state"],
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 64, 70])
def test_a_sequence_cut_anywhere_goes_on_with_its_state(backend, dtype, cut):
    """Outputs and gradients, through the state that is handed on."""
    torch.manual_seed(0)

    def in_two(x, decay):
        head, state = diagonal_scan(
            x[:, :cut], decay[:, :cut], output_final_state=True, backend=backend
        )
        tail, last = diagonal_scan(
            x[:, cut:], decay[:, cut:], state, output_final_state=True, backend=backend
        )
        return torch.cat([head, tail], 1), last

    assert_agrees(
        in_two,
        lambda x, decay: definition(x, decay, None, bounds([70])),
        {
            "x": torch.randn(1, 70, 1, dtype=torch.float64),
            "decay": -torch.rand(1, 70, 1, dtype=torch.float64),
        },
        dtype=dtype,
        device=device_of(backend),
        keep_fp32=["decay"],
    )


def test_blocks_of_a_long_sequence_carry_their_state():
    """More rows than a block of the torch path holds, at a width that makes blocks short."""
    torch.manual_seed(0)
    assert_agrees(
        lambda x, decay: diagonal_scan(x, decay)[0],
        lambda x, decay: definition(x, decay, None, bounds([150]))[0],
        {
            "x": torch.randn(1, 150, 4096, dtype=torch.float64),
            "decay": -torch.rand(1, 150, 4096, dtype=torch.float64),
        },
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_decay_of_minus_infinity_forgets_all(backend, dtype):
    device = device_of(backend)
    x = torch.ones(1, 70, 2, device=device, dtype=dtype, requires_grad=True)
    decay = torch.zeros(1, 70, 2, device=device)
    decay[:, 66] = -torch.inf
    decay.requires_grad_()
    h, _ = diagonal_scan(x, decay, backend=backend)
    assert (h[0, 65:67].float().cpu() == torch.tensor([[66.0], [1.0]])).all()
    gradients = torch.autograd.grad(h.sum(), (x, decay))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.zeros(2, 3, 4)}, "share a shape"),
        ({"initial_state": torch.zeros(1, 5)}, r"initial_state must be \(2, 5\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "needs a batch of 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"x": torch.zeros(2, 3, 5), "decay": torch.zeros(2, 3, 5)}
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**(arguments | change))
