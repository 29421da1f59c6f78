"""The Triton kernels against the definition, one token after the other.

On a CPU they run in Triton's interpreter (which truncates to bf16 where a GPU rounds), on a GPU
for real. `WHOLE_GRID=1 pytest -m slow tests/kernels/triton/test_linear_attention.py` runs the
whole grid instead of a walk through it.
"""

import os
from functools import partial
from itertools import cycle, product

import pytest
import torch

from kernels import linear_attention
from kernels.tools import check
from tests.kernels.agreement import assert_agrees, assert_close, bounds, device_of
from tests.kernels.test_linear_attention import (
    DECAYS,
    KEEP_FP32,
    ROWS,
    assert_causal,
    of_grid,
    reference,
    separate,
    split,
    tokens,
)

DEVICE = device_of("triton")
on_device = {"device": DEVICE, "keep_fp32": KEEP_FP32}
in_triton = partial(linear_attention, backend="triton", output_final_state=True)

LENGTHS = [1, 15, 16, 63, 64, 65, 100, 130]
DIMS = [(16, 16), (60, 64), (128, 16), (16, 60), (64, 64), (16, 128), (60, 60)]
HEADS = [(1, 1), (1, 2), (2, 2)]
DTYPES = [torch.float32, torch.float16]
# Cycles whose lengths share no factor with each other or with the 8 lengths of a row.
WALK = list(
    zip(
        product(ROWS, LENGTHS),
        cycle(DIMS),
        cycle(HEADS),
        cycle([torch.float32, torch.float16, torch.float16, torch.float32, torch.float32]),
        cycle([False, True, True, False, True, False, False, True, False, True, False]),
        strict=False,
    )
)


def agrees(case, dims, heads, dtype, packed):
    inputs, cu_seqlens, rows_used = of_grid(case, dims, heads, packed)
    assert_agrees(
        partial(in_triton, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(DEVICE)),
        partial(reference, cu_seqlens=cu_seqlens),
        inputs,
        dtype=dtype,
        rows_used=rows_used,
        **on_device,
    )


@pytest.mark.parametrize(("case", "dims", "heads", "dtype", "packed"), WALK)
def test_agrees_with_its_definition(case, dims, heads, dtype, packed, poisoned_memory):
    agrees(case, dims, heads, dtype, packed)


# Hours in the interpreter: asked for by name only.
WHOLE_GRID = product(ROWS, LENGTHS) if os.environ.get("WHOLE_GRID") == "1" else []


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [*product((16, 60, 64, 128), repeat=2)])
@pytest.mark.parametrize("case", WHOLE_GRID)
def test_agrees_on_the_whole_grid(case, dims, dtype, packed, poisoned_memory):
    agrees(case, dims, (1, 2), dtype, packed)


@pytest.mark.parametrize("mixer", ["mamba2", "gla", "kda"])
def test_fp32_is_no_more_than_twice_as_wrong_as_plain_torch(mixer, monkeypatch):
    monkeypatch.setattr("kernels.linear_attention", partial(linear_attention, backend="triton"))
    torch.manual_seed(0)
    (case,) = (c for c in check.cases() if c.name == f"linear_attention: {mixer}")
    assert not [e for e in check.errors(case, torch.float32, DEVICE) if e.bad]


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_products_may_be_bf16(decay, delta, poisoned_memory):
    inputs = tokens(decay, delta, 70, Dk=32)
    assert_agrees(in_triton, reference, inputs, dtype=torch.bfloat16, **on_device)


@pytest.mark.parametrize("delta", [False, True])
def test_a_head_may_be_256_wide(delta):
    inputs = tokens("scalar", delta, 66, Hv=1, Dk=256, Dv=200)
    assert_agrees(in_triton, reference, inputs, dtype=torch.float32, **on_device)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("kind", ["-20", "-1e4", "-inf", "one token wipes"])
def test_strong_and_saturated_decay_is_exact_and_finite(decay, delta, kind):
    inputs = tokens(decay, delta, 70, Hv=1)
    if kind != "one token wipes":
        inputs["decay"][:] = float(kind)
    elif decay != "head":
        # Its neighbours decay gently: they must not pay for it in precision.
        inputs["decay"] *= 0.1
        inputs["decay"][:, 5] = -1e4
        inputs["decay"][:, 41:43] = -1e4
    assert_agrees(in_triton, reference, inputs, dtype=torch.float32, **on_device)


@pytest.mark.parametrize(
    ("dtype", "delta"),
    # Not bf16 with the delta rule: reflections that hardly fade carry each rounding on.
    [*product(DTYPES, [False, True]), (torch.bfloat16, False)],
    ids=str,
)
@pytest.mark.parametrize(
    "steps",
    [[0.01], [0.05], [0.3], [1.0], [8.0], [0.01, 1.0, 0.05, 8.0, 0.3]],
    ids=lambda steps: ",".join(map(str, steps)),
)
def test_a_vector_decay_may_be_flat_or_steep_in_each_chunk(steps, dtype, delta):
    """Each of the levels that products over pairs begin at, beside fp32 products (0.01, 0.05 and
    steeper) and beside those of bf16 (to 0.3, 1 and 8)."""
    inputs = tokens("vector", delta, 64 * len(steps) + 6, Hv=1)
    pace = torch.tensor(steps, dtype=torch.float64).repeat_interleave(64)
    pace = torch.cat([pace, pace[:6]])[None, :, None, None]
    inputs["decay"] = -pace * (0.5 + torch.rand_like(inputs["decay"]) / 2)
    inputs["decay"][..., ::2] *= 0.01  # channels of one head keep their own time
    assert_agrees(in_triton, reference, inputs, dtype=dtype, **on_device)


@pytest.mark.parametrize("keys", ["random", "equal", "zero"])
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_full_and_absent_updates_stay_exact(strength, keys):
    inputs = tokens("scalar", True, 70, Hv=1, strength=0.01)
    inputs["beta"][:] = strength  # 2: each update is a reflection
    if keys == "equal":
        inputs["k"][:] = inputs["k"][:, :1].clone()
    if keys == "zero":
        inputs["k"][:, ::3] = 0
    assert_agrees(in_triton, reference, inputs, dtype=torch.float32, **on_device)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_packed_equals_separate(decay, delta):
    lengths = [70, 1, 0, 5]
    cu_seqlens = bounds(lengths)
    inputs = tokens(decay, delta, sum(lengths), N=len(lengths), Hv=1)

    op = partial(in_triton, cu_seqlens=cu_seqlens.to(DEVICE))
    assert_agrees(op, separate(cu_seqlens), inputs, dtype=torch.float32, **on_device)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_a_split_sequence_that_passes_its_state_is_the_whole_one(decay, delta):
    inputs = tokens(decay, delta, 80, Hv=1)
    assert_agrees(split(in_triton, 37), reference, inputs, dtype=torch.float32, **on_device)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_a_later_token_changes_no_earlier_output(decay, delta):
    inputs = tokens(decay, delta, 100, Hv=1)
    inputs = {n: x if x is None else x.float().to(DEVICE) for n, x in inputs.items()}
    assert_causal(in_triton, inputs, (17, 99))


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_rows_of_no_sequence_may_hold_anything(decay, delta, poisoned_memory):
    cu_seqlens = bounds([3, 0, 40]).to(DEVICE)
    inputs = tokens(decay, delta, 50, N=3, Hv=1)
    inputs = {n: x if x is None else x.float().to(DEVICE) for n, x in inputs.items()}
    spoiled = {n: x if x is None else x.clone() for n, x in inputs.items()}
    for x in spoiled.values():
        if x is not None and x.dim() > 1 and x.shape[:2] == (1, 50):
            x[:, 43:] = float("nan")
    results = []
    for given in (inputs, spoiled):
        leaves = [x.requires_grad_() for x in given.values() if x is not None]
        o, state = in_triton(**given, cu_seqlens=cu_seqlens)
        assert (o[:, 43:] == 0).all()
        do = torch.linspace(-1, 1, o.numel(), device=DEVICE).view_as(o).clone()
        do[:, 43:] = float("nan")
        results.append([o, state, *torch.autograd.grad([o, state], leaves, [do, state])])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_the_final_state_alone_has_gradients(decay, delta, poisoned_memory):
    assert_agrees(
        lambda **x: in_triton(**x)[1], lambda **x: reference(**x)[1],
        tokens(decay, delta, 40, Hv=1), dtype=torch.float32, **on_device,
    )  # fmt: skip


@pytest.mark.parametrize("cu_seqlens", [None, [0], [0, 0, 0]])
def test_without_tokens_the_final_state_is_the_initial_one(cu_seqlens):
    N = None if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = tokens("scalar", True, 0, N=N, B=2 if cu_seqlens is None else 1)
    inputs = {n: x.float().to(DEVICE) for n, x in inputs.items()}
    state = inputs["initial_state"].requires_grad_()
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    o, final = in_triton(**inputs, cu_seqlens=cu_seqlens)
    assert o.shape == inputs["v"].shape
    assert torch.equal(final, state)
    (gradient,) = torch.autograd.grad(final.sum(), state)
    assert torch.equal(gradient, torch.ones_like(state))


def test_inputs_may_be_views_of_any_layout():
    inputs = {n: x.float() for n, x in tokens("scalar", True, 40, B=2, Hk=2).items()}
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    for actual, expected in zip(in_triton(**strided), in_triton(**inputs), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"Dk": 300}, "256"),
    ],
)
def test_what_it_cannot_do_is_said(change, message):
    dtype = change.pop("dtype", torch.float32)
    inputs = tokens("none", False, 4, **change)
    inputs = {n: x if x is None else x.to(DEVICE, dtype) for n, x in inputs.items()}
    with pytest.raises(ValueError, match=message):
        in_triton(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("decay", "delta"), ROWS)
@pytest.mark.parametrize("D", [64, 100, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_tensor_cores(decay, delta, D, dtype, poisoned_memory):
    inputs = tokens(decay, delta, 300, Dk=D, Dv=D)
    # The gradient of a head's decay is a sum over all tokens, products rounded.
    terms = {"decay": 300} if decay == "head" else None
    assert_agrees(in_triton, reference, inputs, dtype=dtype, terms=terms, **on_device)


@pytest.mark.gpu
@pytest.mark.parametrize(("decay", "delta"), ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_inputs_give_the_same_bits(decay, delta, dtype):
    inputs = tokens(decay, delta, 500, Dk=128, Dv=128, Hk=2, Hv=4)
    given = {
        n: x if x is None else x.to(DEVICE, dtype if n in "qkv" else torch.float32)
        for n, x in inputs.items()
    }
    leaves = [x.requires_grad_() for x in given.values() if x is not None]
    results = []
    for _ in range(3):
        o, state = in_triton(**given)
        results.append([o, state, *torch.autograd.grad([o.float().sum(), state.sum()], leaves)])
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_offsets_may_pass_two_to_the_31(decay):
    T, H, D = (1 << 31) // (16 * 64) + 1000, 16, 64
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free GPU memory")
    q, k, v = (torch.randn(1, T, H, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    shape = (1, T, H) if decay == "scalar" else (1, T, H, D)
    log_decay = torch.rand(shape, device=DEVICE).neg_()
    beta = torch.rand(1, T, H, device=DEVICE)
    # Two sequences, the second wholly past 2³¹ elements: it must be what it is alone.
    end = T - 200
    cu_seqlens = torch.tensor([0, end, T], device=DEVICE)
    packed, _ = in_triton(q, k, v, log_decay, beta, cu_seqlens=cu_seqlens)
    alone, _ = in_triton(*(x[:, end:] for x in (q, k, v, log_decay, beta)))
    assert_close(packed[:, end:], alone, torch.bfloat16, "output past 2³¹ elements")
