"""`short_convolution` against a window of W inputs slid over each sequence on its own."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import short_convolution
from tests.kernels.agreement import BACKENDS, assert_agrees, assert_close, bounds, device_of

SEQUENCES = {
    "one of 0": [0],
    "one of 1": [1],
    "one of 3": [3],
    "one of 65": [65],
    "mixed": [0, 2, 1, 65, 0, 70, 0],
    "none": [],
}
# D, W, activation, with a bias, with an initial state.
USUAL = (5, 4, "silu", False, True)
FILTERS = [
    (65, 4, "silu", True, True),
    (3, 1, None, True, False),
    (6, 2, "silu", True, False),
    (9, 5, None, False, True),
]


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    D, W = weight.shape
    rows, final = [x.new_zeros(0, D)], [x.new_zeros(0, W - 1, D)]
    for n, (start, end) in enumerate(pairwise(cu_seqlens)):
        halo = x.new_zeros(W - 1, D) if initial_state is None else initial_state[n]
        inputs = torch.cat([halo, x[0, start:end]])
        for t in range(int(end - start)):
            y = (inputs[t : t + W] * weight.t()).sum(0)
            y = y if bias is None else y + bias
            rows.append((F.silu(y) if activation else y)[None])
        final.append(inputs[None, len(inputs) - W + 1 :])
    rows.append(x.new_zeros(x.shape[1] - int(cu_seqlens[-1]), D))
    return torch.cat(rows)[None], torch.cat(final)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "filters"),
    [(lengths, USUAL) for lengths in SEQUENCES.values()]
    + [(SEQUENCES["mixed"], filters) for filters in FILTERS],
)
def test_convolves_each_sequence_alone(backend, dtype, lengths, filters, poisoned_memory):
    D, W, activation, bias, state = filters
    torch.manual_seed(0)
    cu_seqlens = bounds(lengths)
    used = int(cu_seqlens[-1])
    x = torch.randn(1, used + 3, D, dtype=torch.float64)
    x[:, used:] = float("nan")
    inputs = {
        "x": x,
        "weight": torch.randn(D, W, dtype=torch.float64),
        "bias": torch.randn(D, dtype=torch.float64) if bias else None,
        "initial_state": torch.randn(len(lengths), W - 1, D, dtype=torch.float64)
        if state
        else None,
    }
    device = device_of(backend)

    def op(**tensors):
        return short_convolution(
            **tensors,
            activation=activation,
            output_final_state=True,
            cu_seqlens=cu_seqlens.to(device),
            backend=backend,
        )

    def plain(**tensors):
        return definition(**tensors, cu_seqlens=cu_seqlens, activation=activation)

    assert_agrees(op, plain, inputs, dtype=dtype, device=device, rows_used=used)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("T", [0, 1, 63])
def test_batch_rows_are_sequences(backend, dtype, T, poisoned_memory):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(3, T, 5, dtype=torch.float64),
        "weight": torch.randn(5, 4, dtype=torch.float64),
        "initial_state": torch.randn(3, 3, 5, dtype=torch.float64),
    }

    def op(**tensors):
        return short_convolution(**tensors, output_final_state=True, backend=backend)

    def plain(x, weight, initial_state):
        ends = bounds([T] * 3)
        y, final = definition(
            x.reshape(1, -1, 5), weight, None, initial_state, ends, activation="silu"
        )
        return y.view(x.shape), final

    assert_agrees(op, plain, inputs, dtype=dtype, device=device_of(backend))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("cut", [0, 1, 2, 69, 70])
def test_a_sequence_cut_anywhere_goes_on_with_its_halo(backend, dtype, cut):
    torch.manual_seed(0)
    device = device_of(backend)
    x = torch.randn(1, 70, 6, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(6, 4, dtype=torch.float64).to(device, dtype)
    whole, final = short_convolution(x, weight, output_final_state=True, backend=backend)
    head, halo = short_convolution(x[:, :cut], weight, output_final_state=True, backend=backend)
    tail, last = short_convolution(
        x[:, cut:], weight, initial_state=halo, output_final_state=True, backend=backend
    )
    assert_close(torch.cat([head, tail], 1), whole, dtype, "outputs")
    assert torch.equal(last, final)


def test_blocks_of_a_long_sequence_share_their_edges():
    """More rows than a block of the torch path holds, at a width that makes blocks short."""
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(1, 150, 4096, dtype=torch.float64),
        "weight": torch.randn(4096, 4, dtype=torch.float64),
    }

    def plain(x, weight):
        padded = F.pad(x.transpose(1, 2), (3, 0))
        return F.silu(F.conv1d(padded, weight[:, None], groups=4096)).transpose(1, 2)

    assert_agrees(
        lambda **tensors: short_convolution(**tensors)[0], plain, inputs, dtype=torch.float64
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, T, D\)"),
        ({"weight": torch.zeros(4, 4)}, r"weight must be \(5, W\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state must be \(2, 3, 5\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "needs a batch of 1"),
        ({"x": torch.zeros(1, 3, 5), "cu_seqlens": torch.tensor([0, 4])}, "at most 3"),
        ({"x": torch.zeros(1, 3, 5), "cu_seqlens": torch.tensor([0, 2, 1])}, "must rise"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=message):
        short_convolution(**(arguments | change))
