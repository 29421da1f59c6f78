"""`expert_mlp` against its formula, token by token, in every kind of routing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import expert_mlp, experts
from tests.kernels.agreement import BACKENDS, assert_agrees, device_of

D, INNER = 20, 12  # widths that no block divides


def routed(counts: list[int], tokens: int, past: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and ends for experts with these numbers of rows, of random tokens each; then `past`
    rows of no expert."""
    runs = [torch.randperm(tokens)[:count] for count in counts]
    return torch.cat([*runs, torch.randint(tokens, (past,))]), torch.tensor(counts).cumsum(0)


def definition(x, weights, up, out, rows, ends, activation, limit):
    y = torch.zeros_like(x)
    for row, token in enumerate(rows.tolist()):
        expert = int((ends <= row).sum())
        if expert == len(ends):
            continue
        h = up[expert] @ x[token]
        if activation == "relu2":
            a = F.relu(h).square()
        else:
            gate, value = h.chunk(2)
            if limit is not None:
                gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
            a = F.silu(gate) * value
        y = y.index_add(0, torch.tensor([token]), (weights[row] * (out[expert] @ a))[None])
    return y


ROUTINGS = {
    "uneven": ([3, 0, 9, 1], 0),
    "one expert has all rows": ([0, 0, 11, 0], 0),
    "first and last have none": ([0, 5, 5, 0], 0),
    "one expert": ([11], 0),
    "no rows": ([0, 0], 0),
    "rows of no expert": ([4, 2], 5),
}


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("routing", "activation", "limit"),
    [
        *((name, "swiglu", None) for name in ROUTINGS),
        ("uneven", "relu2", None),
        ("uneven", "swiglu", 0.7),
        ("rows of no expert", "relu2", None),
    ],
)
def test_experts_follow_the_formula(backend, dtype, routing, activation, limit, poisoned_memory):
    torch.manual_seed(0)
    counts, past = ROUTINGS[routing]
    tokens = 11
    rows, ends = routed(counts, tokens, past)
    wide = 2 * INNER if activation == "swiglu" else INNER
    device = device_of(backend)
    inputs = {
        "x": torch.randn(tokens, D, dtype=torch.float64),
        "weights": torch.randn(len(rows), dtype=torch.float64),
        "up": torch.randn(len(counts), wide, D, dtype=torch.float64) / D**0.5,
        "out": torch.randn(len(counts), D, INNER, dtype=torch.float64) / INNER**0.5,
    }
    form = {"activation": activation, "limit": limit}
    assert_agrees(
        lambda x, weights, up, out: expert_mlp(
            x, rows.to(device), weights, ends.to(device), up, out, backend=backend, **form
        ),
        lambda x, weights, up, out: definition(x, weights, up, out, rows, ends, **form),
        inputs,
        dtype=dtype,
        device=device,
        keep_fp32=["weights"],
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_experts_of_many_tiles_and_pieces(backend, monkeypatch):
    """Rows over several tiles of 64, pieces of 50, and 70 experts, most of them without rows."""
    monkeypatch.setattr(experts, "PIECE", 50)
    torch.manual_seed(0)
    tokens, counts = 150, [0] * 70
    counts[3], counts[4], counts[60] = 131, 1, 150
    rows, ends = routed(counts, tokens)
    device = device_of(backend)
    inputs = {
        "x": torch.randn(tokens, 8, dtype=torch.float64),
        "weights": torch.randn(len(rows), dtype=torch.float64),
        "up": torch.randn(70, 8, 8, dtype=torch.float64) / 3,
        "out": torch.randn(70, 8, 4, dtype=torch.float64) / 2,
    }
    form = {"activation": "swiglu", "limit": None}
    assert_agrees(
        lambda x, weights, up, out: expert_mlp(
            x, rows.to(device), weights, ends.to(device), up, out, backend=backend
        ),
        lambda x, weights, up, out: definition(x, weights, up, out, rows, ends, **form),
        inputs,
        dtype=torch.float32,
        device=device,
        terms={"up": 150, "out": 150},
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_matrices_of_experts_without_rows_are_not_read(backend):
    """So few tokens cost the chosen experts' weights; the gradients of the others are 0."""
    torch.manual_seed(0)
    counts = [0, 2, 0, 3, 0]
    rows, ends = routed(counts, 3)
    device = device_of(backend)
    x, weights = (torch.randn(shape, device=device) for shape in ((3, 8), (len(rows),)))
    up, out = (torch.randn(shape, device=device) for shape in ((5, 8, 8), (5, 8, 4)))
    empty = torch.tensor(counts, device=device) == 0
    given = [x, weights, up, out]
    poisoned = [x, weights, *(w.masked_fill(empty.view(-1, 1, 1), torch.nan) for w in (up, out))]

    def made(tensors: list[Tensor]) -> list[Tensor]:
        x, weights, up, out = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = expert_mlp(x, rows.to(device), weights, ends.to(device), up, out, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    got = made(poisoned)
    for one, other in zip(got, made(given), strict=True):
        assert torch.equal(one, other)
    for of_matrices in got[3:]:
        assert not of_matrices[empty].any()


def test_a_row_keeps_what_the_docstring_says():
    """Beside x and the weights of the experts: U numbers, the token, the factor."""
    tokens, chosen, wide = 64, 2, 2 * INNER
    rows = torch.arange(tokens).repeat(chosen)
    x = torch.randn(tokens, D, requires_grad=True)
    weights = torch.rand(len(rows), requires_grad=True)
    up, out = (
        torch.randn(shape, requires_grad=True) for shape in ((chosen, wide, D), (chosen, D, INNER))
    )
    ends = torch.tensor([tokens, 2 * tokens], dtype=torch.int32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_mlp(x, rows, weights, ends, up, out)
    own = [t for t in kept if not any(t is given for given in (x, up, out, ends))]
    assert sum(t.numel() * t.element_size() for t in own) == len(rows) * (4 * wide + 8 + 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must be \(T, D\)"),
        ({"out": torch.zeros(2, 4, 4)}, r"out must be \(E, D, I\) = \(2, 4, 3\)"),
        ({"out": torch.zeros(2, 4, 3).double()}, "up and out must be torch.float32"),
        ({"ends": torch.zeros(3, dtype=torch.int32)}, r"ends \(2,\)"),
        ({"weights": torch.zeros(4)}, r"rows and weights must be \(R,\)"),
        ({"activation": "gelu"}, "swiglu or relu2"),
        ({"limit": -1.0}, "above 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    given = {
        "x": torch.zeros(3, 4),
        "rows": torch.zeros(5, dtype=torch.int64),
        "weights": torch.zeros(5),
        "ends": torch.tensor([2, 5]),
        "up": torch.zeros(2, 6, 4),
        "out": torch.zeros(2, 4, 3),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        expert_mlp(**given)
