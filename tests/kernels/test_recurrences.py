"""A recurrence in steps against its definition, which knows the entering state from the start."""

from __future__ import annotations

import sys
from itertools import pairwise, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.chunked import linear_attention as chunked
from kernels.recurrences import DiagonalScan, LinearAttention, Packed
from kernels.segments import apply_segment
from tests.kernels.agreement import assert_close, bounds
from tests.kernels.test_linear_attention import ROWS, reference, tokens

LENGTHS = [(70,), (40, 1, 33)]
NAMES = ("q", "k", "v", "decay", "beta")


def packed(lengths, device="cpu"):
    return Packed(lengths, None if len(lengths) == 1 else bounds(lengths).to(device))


def scan_reference(x, decay, initial_state, cu_seqlens):
    """h_t = exp(decay_t) h_{t−1} + x_t, and the last of each sequence."""
    rows, last = [], []
    for n, (start, end) in enumerate(pairwise(cu_seqlens)):
        h = initial_state[n]
        for t in range(start, end):
            h = decay[0, t].exp() * h + x[0, t]
            rows.append(h)
        last.append(h)
    return torch.stack(rows)[None], torch.stack(last)


def assert_steps_agree(recurrence, inputs, state, lengths, definition, dtype, device="cpu"):
    """Every result of the steps, with a state and gradients that come late.

    Args:
        inputs: fp64, by name; state: (N, H, Dk, Dv).
        definition: (inputs by name, state, cu_seqlens) -> o and final states, differentiable.
    """
    segments, cu_seqlens = packed(lengths, device), bounds(lengths)
    given = tuple(None if x is None else x.to(device, dtype) for x in inputs.values())
    exact = {
        n: x if x is None else x.to(dtype).to(torch.float64, copy=True).requires_grad_()
        for n, x in inputs.items()
    }
    S = state.to(dtype).to(torch.float64, copy=True).requires_grad_()
    o, final = definition(exact, S, cu_seqlens)
    do, dfinal = torch.randn_like(o), torch.randn_like(final)
    leaves = [x for x in exact.values() if x is not None]
    *wanted, dS = torch.autograd.grad([o, final], [*leaves, S], [do, dfinal])
    do, dfinal = do.to(device, dtype), dfinal.to(device, torch.promote_types(dtype, torch.float32))

    def check(gradients, what):
        found = [g for g, x in zip(gradients, given, strict=True) if x is not None]
        for name, actual, expected in zip(exact, found, wanted, strict=False):
            assert actual.dtype == dtype
            assert_close(actual, expected, dtype, f"gradient of {name}, {what}")

    begun = recurrence.begin(given, segments)
    shapes = recurrence.shapes(given)
    assert begun.M.shape[1:] == shapes.M[1:]
    assert begun.E.shape[1:] == shapes.E[1:]
    late = S.detach().to(begun.E)
    assert_close(apply_segment(begun.M, begun.E, late), final, dtype, "M S + E")
    entered, kept = recurrence.finish(given, segments, begun, late)
    assert entered.dtype == dtype
    assert_close(entered, o, dtype, "o⁰ + R S")
    entering, pending = recurrence.begin_backward(given, segments, kept, do)
    transposed = begun.M.mT if begun.M.dim() == 4 else begun.M
    assert_close(apply_segment(transposed, entering, dfinal), dS, dtype, "Rᵀ do + Mᵀ dS")
    check(
        recurrence.finish_backward(given, segments, late, kept, do, pending, dfinal),
        "state entered late",
    )

    forward = recurrence.forward(given, segments, late)
    assert_close(forward.o, o, dtype, "o")
    assert_close(forward.state, final, dtype, "final state")
    gradients, dentering = recurrence.backward(given, segments, late, forward.kept, do, dfinal)
    check(gradients, "state entered at once")
    assert_close(dentering, dS, dtype, "gradient of the state")


def linear_reference(inputs, state, cu_seqlens):
    return reference(**inputs, initial_state=state, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_linear_attention_in_steps(decay, delta, lengths, dtype, monkeypatch, poisoned_memory):
    monkeypatch.setattr(chunked, "SLAB", 128)  # several slabs
    inputs = tokens(decay, delta, sum(lengths), N=len(lengths), Dk=20, Dv=12, strength=0.1)
    state = inputs.pop("initial_state")
    recurrence = LinearAttention(backend="torch")
    assert_steps_agree(recurrence, inputs, state, lengths, linear_reference, dtype)


def assert_scan_agrees(recurrence, lengths, dtype, device="cpu"):
    torch.manual_seed(0)
    T, N = sum(lengths), len(lengths)
    x, decay = torch.randn(2, 1, T, 6, dtype=torch.float64).unbind()
    inputs, state = {"x": x, "decay": -0.1 * decay.abs()}, torch.randn(N, 6, 1, 1).double()

    def definition(inputs, state, cu_seqlens):
        h, final = scan_reference(**inputs, initial_state=state[..., 0, 0], cu_seqlens=cu_seqlens)
        return h, final[..., None, None]

    assert_steps_agree(recurrence, inputs, state, lengths, definition, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_diagonal_scan_in_steps(lengths, dtype, poisoned_memory, monkeypatch):
    # The op's name hides its module's. Blocks of 20 rows, so several a segment.
    monkeypatch.setattr(sys.modules["kernels.diagonal_scan"], "BLOCK_ELEMENTS", 6 * 20)
    assert_scan_agrees(DiagonalScan("torch"), lengths, dtype)


@pytest.mark.parametrize("log_decay", [-20.0, -1e4, -torch.inf])
@pytest.mark.parametrize(("decay", "delta"), [r for r in ROWS if r[0] != "none"])
def test_a_state_that_decays_to_nothing_leaves_finite_maps(decay, delta, log_decay):
    inputs = tokens(decay, delta, 70, Dk=20, Dv=12)
    inputs["decay"][..., 30 : 40 if decay != "head" else None] = log_decay if decay == "head" else 0
    if decay != "head":
        inputs["decay"][:, 30:40] = log_decay
    state = inputs.pop("initial_state")
    recurrence = LinearAttention(backend="torch")
    assert_steps_agree(recurrence, inputs, state, (70,), linear_reference, torch.float32)


class Products(TorchDispatchMode):
    """Counts FLOPs of matrix products, in place ones too, which `FlopCounterMode` leaves out."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def step_flops(recurrence, given, state, do, counter):
    """FLOPs of forward and backward from a state that is there, and from one that comes late."""
    segments, found = packed((given[0].shape[1],)), []
    forward = recurrence.forward(given, segments, state)
    recurrence.backward(given, segments, state, forward.kept, do, state)
    found.append(counter())
    _, kept = recurrence.finish(given, segments, recurrence.begin(given, segments), state)
    _, pending = recurrence.begin_backward(given, segments, kept, do)
    recurrence.finish_backward(given, segments, state, kept, do, pending, state)
    found.append(counter() - found[0])
    return found


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_a_state_that_comes_late_costs_less_than_a_third_more(decay, delta):
    """In FLOPs of heads of 64 channels: 1.3 times with the delta rule, else 1.2 times."""
    inputs = tokens(decay, delta, 256, Hv=1, Dk=64, Dv=64)
    state = inputs.pop("initial_state").float()
    given = tuple(None if x is None else x.float() for x in inputs.values())
    with Products() as products:
        at_once, late = step_flops(
            LinearAttention(backend="torch"), given, state, given[2], lambda: products.flops
        )
    assert at_once > 0
    assert 1 < late / at_once < (1.3 if delta else 1.2)


def test_autocast_changes_no_step():
    inputs = tokens("scalar", True, 40)
    state = inputs.pop("initial_state")
    given, segments = tuple(x.float() for x in inputs.values()), packed((40,))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            recurrence = LinearAttention(backend="torch")
            begun = recurrence.begin(given, segments)
            o, kept = recurrence.finish(given, segments, begun, state.float())
            dS, _ = recurrence.begin_backward(given, segments, kept, o)
        found.append((o, kept[0], begun.M, begun.E, dS))
    for plain, under_autocast in zip(*found, strict=True):
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize(
    ("decay", "delta"), list(product(["none", "scalar", "vector"], [False, True]))
)
def test_bf16_rounds_outputs_and_no_state(decay, delta):
    inputs = tokens(decay, delta, 70, strength=0.1)
    state = inputs.pop("initial_state").float()
    given = tuple(None if x is None else x.bfloat16() for x in inputs.values())
    recurrence, segments = LinearAttention(backend="torch"), packed((70,))
    begun = recurrence.begin(given, segments)
    o, kept = recurrence.finish(given, segments, begun, state)
    assert {begun.M.dtype, begun.E.dtype, kept[0].dtype} == {torch.float32}
    rounded = {n: None if x is None else x.double() for n, x in zip(inputs, given, strict=True)}
    wanted, _ = reference(**rounded, initial_state=state.double())
    assert o.dtype == torch.bfloat16
    assert_close(o, wanted, torch.bfloat16, "o")
