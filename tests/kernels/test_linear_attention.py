"""`linear_attention` in chunks against its definition, one token after the other.

The Triton kernels have tests of their own; what is here holds the torch backend and the arguments.
"""

from functools import partial
from itertools import cycle, pairwise, product

import pytest
import torch
from torch.nn.functional import normalize, sigmoid

from kernels import linear_attention
from kernels.chunked import linear_attention as chunked
from tests.kernels.agreement import assert_agrees, assert_close, bounds

DECAYS = ["none", "head", "scalar", "vector"]
ROWS = list(product(DECAYS, [False, True]))
KEEP_FP32 = ("decay", "beta", "initial_state")

reference = partial(linear_attention, backend="reference", output_final_state=True)
in_chunks = partial(linear_attention, backend="torch", output_final_state=True)


def tokens(decay, delta, T, *, B=1, N=None, Hk=1, Hv=2, Dk=16, Dv=16, strength=1.0):
    """Random fp64 inputs by name, with an initial state."""
    torch.manual_seed(T)
    shape = {"none": None, "head": (Hv,), "scalar": (B, T, Hv), "vector": (B, T, Hv, Dk)}[decay]

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64)

    return {
        "q": random(B, T, Hk, Dk),
        "k": normalize(random(B, T, Hk, Dk), dim=-1),
        "v": random(B, T, Hv, Dv),
        "decay": None if shape is None else -strength * random(*shape).abs(),
        "beta": 2 * sigmoid(2 * random(B, T, Hv)) if delta else None,
        "initial_state": random(B if N is None else N, Hv, Dk, Dv),
    }


def cut(inputs, start, end):
    """The tokens from start to end, without the state."""
    return {
        name: x[:, start:end] if x is not None and x.dim() > 1 else x
        for name, x in inputs.items()
        if name != "initial_state"
    }


def separate(cu_seqlens):
    """The definition on one sequence after the other, their results laid end to end."""

    def op(initial_state, **packed):
        results = [
            reference(**cut(packed, start, end), initial_state=initial_state[n : n + 1])
            for n, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return op


def split(op, middle):
    """`op` on the tokens before `middle`, then on the others with the state that it left."""

    def halves(initial_state, **whole):
        first, state = op(**cut(whole, 0, middle), initial_state=initial_state)
        second, state = op(**cut(whole, middle, whole["q"].shape[1]), initial_state=state)
        return torch.cat([first, second], dim=1), state

    return halves


def assert_causal(op, inputs, times):
    """Whatever tokens from each of `times` on are, the outputs before have the same bits."""
    before, _ = op(**inputs)
    for t in times:
        changed = dict(inputs)
        for name in ("q", "k", "v", "decay", "beta"):
            x = inputs[name]
            if x is not None and x.dim() > 1:
                other = torch.rand_like(x[:, t:]) * (-1 if name == "decay" else 1)
                changed[name] = torch.cat([x[:, :t], other], dim=1)
        after, _ = op(**changed)
        assert torch.equal(after[:, :t], before[:, :t])


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16]
DTYPES += [torch.float64, torch.float32]
# Cycles of lengths that share no factor meet in all pairs over the table.
GRID = list(
    zip(
        product(ROWS, [1, 15, 16, 63, 64, 65, 100, 130]),
        cycle([(16, 16), (60, 64), (64, 16), (16, 60), (64, 64)]),
        cycle([(1, 1), (1, 2), (2, 2)]),
        cycle(DTYPES),
        strict=False,
    )
)


def of_grid(case, dims, heads, packed):
    """Inputs, cu_seqlens and the rows in use; some packed sequences are empty or of one token."""
    (decay, delta), T = case
    cu_seqlens = rows_used = N = None
    if packed:
        lengths = [0, T // 3, 1, 0, T - T // 3, 0]
        cu_seqlens, N, rows_used = bounds(lengths), len(lengths), T + 1
        T += 4
    inputs = tokens(
        decay, delta, T, B=1 if packed or T > 64 else 2, N=N,
        Hk=heads[0], Hv=heads[1], Dk=dims[0], Dv=dims[1],
    )  # fmt: skip
    return inputs, cu_seqlens, rows_used


@pytest.mark.parametrize(("case", "dims", "heads", "dtype"), GRID)
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_its_definition(case, dims, heads, dtype, packed, poisoned_memory, monkeypatch):
    monkeypatch.setattr(chunked, "SLAB", 128)  # several slabs
    inputs, cu_seqlens, rows_used = of_grid(case, dims, heads, packed)
    assert_agrees(
        partial(in_chunks, cu_seqlens=cu_seqlens),
        partial(reference, cu_seqlens=cu_seqlens),
        inputs,
        dtype=dtype,
        keep_fp32=KEEP_FP32,
        rows_used=rows_used,
    )


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_packed_equals_separate(decay, delta):
    lengths = [70, 1, 0, 33, 32, 5]
    cu_seqlens = bounds(lengths)
    inputs = tokens(decay, delta, sum(lengths), N=len(lengths))

    op = partial(in_chunks, cu_seqlens=cu_seqlens)
    assert_agrees(op, separate(cu_seqlens), inputs, dtype=torch.float64)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_many_short_sequences_are_each_alone(decay, delta, monkeypatch):
    monkeypatch.setattr(chunked, "SLAB", 256)  # a step of many slabs
    lengths = [n % 4 for n in range(40)] + [70, 40]
    cu_seqlens = bounds(lengths)
    inputs = tokens(decay, delta, sum(lengths), N=len(lengths), Dk=8, Dv=4)
    assert_agrees(
        partial(in_chunks, cu_seqlens=cu_seqlens),
        partial(reference, cu_seqlens=cu_seqlens),
        inputs,
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("decay", "delta"), ROWS)
@pytest.mark.parametrize("middle", [1, 32, 47])
def test_a_split_sequence_that_passes_its_state_is_the_whole_one(decay, delta, middle):
    inputs = tokens(decay, delta, 80, B=2)
    assert_agrees(split(in_chunks, middle), reference, inputs, dtype=torch.float64)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_a_later_token_changes_no_earlier_output(decay, delta):
    inputs = {n: x if x is None else x.float() for n, x in tokens(decay, delta, 100).items()}
    assert_causal(in_chunks, inputs, (0, 17, 50, 99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kind", ["-20", "-1e4", "-inf", "one token wipes", "nothing decays"])
def test_strong_and_saturated_decay_is_exact_and_finite(decay, delta, dtype, kind):
    inputs = tokens(decay, delta, 70)
    if kind == "nothing decays":
        inputs["decay"] *= 0
    elif kind == "one token wipes" and decay != "head":
        # Its neighbours decay gently: they must not pay for it in precision.
        inputs["decay"] *= 0.1
        inputs["decay"][:, 5] = -1e4
        inputs["decay"][:, 41:43] = -1e4
    elif kind != "one token wipes":
        inputs["decay"][:] = float(kind)
    assert_agrees(in_chunks, reference, inputs, dtype=dtype, keep_fp32=KEEP_FP32)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_a_gradient_that_is_tiny_is_not_noise(decay):
    inputs = tokens(decay, False, 70)
    inputs["decay"][:] = -12.0  # its gradient is near 1e-5 of the others
    inputs = {n: x if x is None else x.requires_grad_() for n, x in inputs.items()}
    do = torch.randn(1, 70, 2, 16, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference(**inputs)[0], inputs["decay"], do)
    rounded = {n: x if x is None else x.float() for n, x in inputs.items()}
    (actual,) = torch.autograd.grad(in_chunks(**rounded)[0], inputs["decay"], do.float())
    size = expected.abs().max()
    assert size < 1e-3
    assert_close(actual / size, expected / size, torch.float32, "gradient of decay")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", ["random", "equal", "zero"])
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_full_and_absent_updates_stay_exact(keys, strength, dtype):
    inputs = tokens("scalar", True, 70, strength=0.01)
    inputs["beta"][:] = strength  # 2: each update is a reflection
    if keys == "equal":
        inputs["k"][:] = inputs["k"][:, :1].clone()
    if keys == "zero":
        inputs["k"][:, ::3] = 0
    assert_agrees(in_chunks, reference, inputs, dtype=dtype, keep_fp32=KEEP_FP32)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_rows_of_no_sequence_may_hold_anything(decay, delta, poisoned_memory):
    cu_seqlens = bounds([3, 0, 40])
    inputs = tokens(decay, delta, 50, N=3)
    spoiled = {n: x if x is None else x.clone() for n, x in inputs.items()}
    for x in spoiled.values():
        if x is not None and x.dim() > 1 and x.shape[:2] == (1, 50):
            x[:, 43:] = float("nan")
    results = []
    for given in (inputs, spoiled):
        leaves = [x.requires_grad_() for x in given.values() if x is not None]
        o, state = in_chunks(**given, cu_seqlens=cu_seqlens)
        assert (o[:, 43:] == 0).all()
        do = torch.arange(o.numel(), dtype=o.dtype).view_as(o).clone()
        do[:, 43:] = float("nan")
        results.append([o, state, *torch.autograd.grad([o, state], leaves, [do, state])])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_the_final_state_alone_has_gradients(decay, delta):
    assert_agrees(
        lambda **x: in_chunks(**x)[1], lambda **x: reference(**x)[1],
        tokens(decay, delta, 40, B=2), dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize(("decay", "delta"), ROWS)
@pytest.mark.parametrize("cu_seqlens", [None, [0], [0, 0, 0]])
def test_without_tokens_the_final_state_is_the_initial_one(decay, delta, cu_seqlens):
    N = None if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = tokens(decay, delta, 0, N=N, B=2 if cu_seqlens is None else 1)
    state = inputs["initial_state"].requires_grad_()
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    o, final = in_chunks(**inputs, cu_seqlens=cu_seqlens)
    assert o.shape == inputs["v"].shape
    assert torch.equal(final, state)
    (gradient,) = torch.autograd.grad(final.sum(), state)
    assert torch.equal(gradient, torch.ones_like(state))


def test_inputs_may_be_views_of_any_layout():
    inputs = tokens("scalar", True, 40, B=2, Hk=2, Hv=2)
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    for actual, expected in zip(in_chunks(**strided), in_chunks(**inputs), strict=True):
        assert_close(actual, expected, torch.float64, "result")
    assert_agrees(
        lambda v, **x: in_chunks(v=v.expand(2, 40, 2, 16), **x),
        lambda v, **x: reference(v=v.expand(2, 40, 2, 16), **x),
        {**inputs, "v": inputs["v"][:1, :1]},
        dtype=torch.float64,
    )


def test_autocast_changes_nothing():
    inputs = {n: x.float() for n, x in tokens("scalar", True, 70).items()}
    plain, _ = in_chunks(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = in_chunks(**inputs)
    assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("decay", DECAYS)
def test_keeps_the_inputs_and_one_state_a_slab(decay):
    inputs = {
        n: x if x is None else x.float().requires_grad_()
        for n, x in tokens(decay, True, 8 * chunked.SLAB // 2).items()
    }
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        in_chunks(**inputs)
    given = sum(x.numel() for x in inputs.values() if x is not None)
    state = inputs["initial_state"].numel()
    if decay == "head":  # one a token is saved as a view
        given += 8 * chunked.SLAB - inputs["decay"].numel()
    assert sum(x.numel() for x in kept) <= given + 8 * state


@pytest.mark.parametrize(
    "name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"]
)
def test_agrees_with_the_gated_delta_rule_of_transformers(name):
    qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = getattr(qwen3_next, name)
    inputs = {n: x.float() for n, x in tokens("scalar", True, 150, Hk=2, Hv=2, Dk=32).items()}
    ours = in_chunks(**inputs)
    inputs["g"] = inputs.pop("decay")
    inputs["query"], inputs["key"], inputs["value"] = map(inputs.pop, "qkv")
    expected = theirs(**inputs, output_final_state=True)
    for actual, wanted, what in zip(ours, expected, ["o", "final state"], strict=True):
        assert_close(actual, wanted, torch.float32, what)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"k": torch.zeros(1, 9, 1, 15)}, r"\(1, 9, 1, 15\)"),
        ({"v": torch.zeros(1, 8, 2, 16)}, r"\(1, 8, 2, 16\)"),
        ({"q": torch.zeros(1, 9, 2, 16), "k": torch.zeros(1, 9, 2, 16),
          "v": torch.zeros(1, 9, 3, 16)}, r"\(1, 9, 3, 16\)"),
        ({"v": torch.zeros(1, 9, 2, 16, dtype=torch.float16)}, "float16"),
        ({"decay": torch.zeros(3)}, r"\(3,\)"),
        ({"beta": torch.zeros(1, 9, 1)}, r"\(1, 9, 1\)"),
        ({"initial_state": torch.zeros(2, 2, 16, 16)}, r"\(2, 2, 16, 16\)"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "float32"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "10"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "1, 9"),
        ({"cu_seqlens": torch.tensor([0, 6, 4]), "initial_state": None}, "6, 4"),
        ({"backend": "cuda"}, "cuda"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named_with_their_value(change, value):
    inputs = {n: x.float() for n, x in tokens("scalar", True, 9).items()}
    with pytest.raises(ValueError, match=value):
        linear_attention(**{"backend": "torch", **inputs, **change})


def test_packed_sequences_need_a_batch_of_one():
    inputs = tokens("scalar", True, 9, B=2)
    with pytest.raises(ValueError, match="B is 2"):
        linear_attention(**inputs, cu_seqlens=torch.tensor([0, 9, 18]))
