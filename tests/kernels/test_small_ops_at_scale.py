"""The small ops where only a GPU can go: past 2³¹ elements, and the same bits every time."""

import pytest
import torch

from kernels import (
    diagonal_scan,
    linear_cross_entropy,
    rms_norm,
    rotary_embedding,
    short_convolution,
)

pytestmark = pytest.mark.gpu

D = 2048
BEYOND = (1 << 31) // D + 65  # rows
TAIL = 130


def silu_convolution(x):
    weight = torch.linspace(-1, 1, 4 * D, device=x.device, dtype=x.dtype).view(D, 4)
    return short_convolution(x, weight)[0]


def gated_norm(x):
    return rms_norm(x, torch.linspace(0.5, 1, D, device=x.device), gate=x)


def fading_scan(x):
    """Forgets all but the last few rows, so that a tail knows its own past."""
    return diagonal_scan(x, torch.full_like(x, -20.0))[0]


def still_rotary(x):
    heads = x.unflatten(2, (D // 64, 64))
    positions = torch.full((x.shape[1],), 5, device=x.device)
    return rotary_embedding(heads, positions).flatten(2)


OPS = [silu_convolution, gated_norm, fading_scan, still_rotary]


@pytest.mark.parametrize("op", OPS)
def test_rows_past_two_billion_elements_are_those_of_a_short_input(op):
    x = torch.zeros(1, BEYOND, D, device="cuda", dtype=torch.bfloat16)
    x[:, -TAIL:].normal_(generator=torch.Generator("cuda").manual_seed(0))
    tail = x[:, -TAIL:].clone().requires_grad_()
    x.requires_grad_()
    long, short = op(x)[:, -TAIL:], op(tail)
    torch.testing.assert_close(long, short)
    for y in (long, short):
        y.float().square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, -TAIL:], tail.grad)


def test_logits_past_two_billion_elements_are_chunked_apart():
    """More logits over all chunks than 32 bits can count."""
    T, V = (1 << 16) + 3, 1 << 15
    hidden = torch.randn(T, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(V, 64, device="cuda", dtype=torch.bfloat16) / 8
    labels = torch.full((T,), -100, device="cuda")
    labels[-TAIL:] = torch.arange(TAIL, device="cuda")
    whole, _ = linear_cross_entropy(hidden, weight, labels)
    tail, _ = linear_cross_entropy(hidden[-TAIL:], weight, labels[-TAIL:])
    assert whole.item() == pytest.approx(tail.item(), rel=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_the_same_inputs_give_the_same_bits(op):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 4001, D, device="cuda", dtype=torch.bfloat16, generator=generator)
    x.requires_grad_()

    def run():
        y = op(x)
        return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
