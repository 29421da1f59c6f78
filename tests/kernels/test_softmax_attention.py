"""`softmax_attention` against the whole matrix of scores, masked."""

import pytest
import torch

from kernels import flash, softmax_attention, softmax_attention_backward
from kernels.backend import imagining
from kernels.chunked.softmax_attention import WINDOW_ROWS
from tests.kernels.agreement import assert_agrees, bounds

# Lengths of the queries and of the keys, sequence by sequence.
SEQUENCES = {
    "one of 0": ([0], [0]),
    "one of 1": ([1], [1]),
    "one of 65": ([65], [65]),
    "packed": ([0, 3, 1, 63, 0], [0, 3, 1, 63, 0]),
    "keys alone": ([0, 2], [5, 2]),
    "queries alone": ([5, 2], [0, 2]),
    "more keys": ([3, 33, 1], [7, 65, 64]),
    "more queries": ([7, 65, 64], [3, 33, 1]),
    "many blocks": ([2 * WINDOW_ROWS + 7], [2 * WINDOW_ROWS + 7]),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def definition(q, k, v, q_ends, k_ends, causal, window, scale):
    T, H = q.shape[1:3]
    o, lse = [], []
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    for n in range(len(q_ends) - 1):
        Q = q[0, q_ends[n] : q_ends[n + 1]]
        K, V = (x[0, k_ends[n] : k_ends[n + 1]] for x in (k, v))
        newest = torch.arange(len(Q))[:, None] + len(K) - len(Q)
        key = torch.arange(len(K))
        seen = torch.ones(len(Q), len(K), dtype=torch.bool)
        if causal:
            seen = (key <= newest) & (key > newest - (window or len(K) + len(Q)))
        scores = torch.einsum("ihd,jhd->ihj", Q, K) * scale
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        blind = ~seen.any(1)
        lse.append(scores.logsumexp(2))
        weights = torch.softmax(scores.masked_fill(blind[:, None, None], 0), 2)
        o.append(torch.einsum("ihj,jhd->ihd", weights.masked_fill(blind[:, None, None], 0), V))
    rest = T - int(q_ends[-1])
    o.append(q.new_zeros(rest, H, v.shape[3]))
    lse.append(q.new_full((rest, H), -torch.inf))
    return torch.cat(o)[None], torch.cat(lse)[None]


def packed_inputs(q_lengths, k_lengths, Hq, Hk, D, Dv):
    rows, keys = sum(q_lengths), sum(k_lengths)
    q = torch.randn(1, rows + 2, Hq, D, dtype=torch.float64)
    k = torch.randn(1, keys + 3, Hk, D, dtype=torch.float64)
    v = torch.randn(1, keys + 3, Hk, Dv, dtype=torch.float64)
    q[:, rows:] = float("nan")
    k[:, keys:] = float("nan")
    v[:, keys:] = float("nan")
    return {"q": q, "k": k, "v": v}


def finite(lse):
    """The log-sum-exp where something is seen: −inf has no gradient to compare."""
    return lse.masked_fill(lse == -torch.inf, 0)


def seen(Q, K, causal, window):
    """Which keys the queries of one sequence may see, as the flash kernels mean it."""
    newest = torch.arange(len(Q))[:, None] + len(K) - len(Q)
    key = torch.arange(len(K))
    return (key <= newest) & (key > newest - (window or len(K) + len(Q))) if causal else key >= 0


def flash_forward(q, k, v, *, p):
    """What a flash kernel on a GPU gives: (Tq, Hq, D), lse (Hq, Tq); untouched rows are NaN."""
    o, lse = definition(q[None], k[None], v[None], p.cu_q, p.cu_k, p.causal, p.window, p.scale)
    o, lse = o[0], lse[0].masked_fill(lse[0] == -torch.inf, torch.inf)
    o[int(p.cu_q[-1]) :] = lse[int(p.cu_q[-1]) :] = float("nan")
    return o, lse.t(), None


def flash_backward(do, o, q, k, v, *, lse, rng_state, p):
    """The same kernels' gradients, from the o and lse that they are given."""
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for n in range(len(p.cu_q) - 1):
        rows, keys = (slice(int(cu[n]), int(cu[n + 1])) for cu in (p.cu_q, p.cu_k))
        Q, dO, sums = q[rows], do[rows], lse.t()[rows]
        K, V = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        mask = seen(Q, K, p.causal, p.window)
        P = (torch.einsum("ihd,jhd->ihj", Q, K) * p.scale - sums[:, :, None]).exp()
        P = P.masked_fill(~mask.expand(len(Q), len(K))[:, None], 0)
        dP = torch.einsum("ihd,jhd->ihj", dO, V) - (dO * o[rows]).sum(-1, keepdim=True)
        dS = P * dP * p.scale
        dq[rows] = torch.einsum("ihj,jhd->ihd", dS, K)
        dk[keys] = torch.einsum("ihj,ihd->jhd", dS, Q).unflatten(1, (-1, group)).sum(2)
        dv[keys] = torch.einsum("ihj,ihd->jhd", P, dO).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


@pytest.fixture(params=["torch's flash", "products", "a GPU's flash"])
def path(request, monkeypatch):
    """Each way of computing it. Where there is no GPU, its kernels are stood in for by their
    definition: what is tested is all that is done around them."""
    if request.param == "products":
        monkeypatch.setattr("kernels.chunked.softmax_attention._has_flash", lambda x: False)
    elif request.param == "a GPU's flash":
        monkeypatch.setattr("kernels.flash.usable", lambda q, v: True)
        monkeypatch.setattr("kernels.flash._forward", flash_forward)
        monkeypatch.setattr("kernels.flash._backward", flash_backward)
    return request.param


@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5)])
def test_every_path_agrees(path, lengths, causal, window):
    """Values and gradients, through the log-sum-exp too, in fp64."""
    for with_lse in (False, True):
        check(torch.float64, lengths, causal, window, with_lse, D=8, Dv=5)


def test_the_widest_heads_that_flash_takes_have_a_gradient_of_lse(monkeypatch):
    """Qwen3-Next's: there is no channel left to put it in."""
    monkeypatch.setattr("kernels.flash._forward", flash_forward)
    monkeypatch.setattr("kernels.flash._backward", flash_backward)
    q = torch.empty(1, 1, 256, dtype=torch.bfloat16, device="meta")
    with imagining("cuda"):
        assert flash.usable(q, q)
        assert not flash.usable(q.new_empty(1, 1, 264), q)
    monkeypatch.setattr("kernels.flash.usable", lambda q, v: True)
    check(torch.float64, SEQUENCES["packed"], True, None, True, D=256, Dv=256)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (False, None), (True, 1), (True, 5), (True, 300)]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_each_row_sees_what_it_may(dtype, lengths, causal, window, with_lse, poisoned_memory):
    check(dtype, lengths, causal, window, with_lse)


def check(dtype, lengths, causal, window, with_lse, D=8, Dv=8):
    torch.manual_seed(0)
    q_ends, k_ends = (bounds(x) for x in lengths)
    arguments = {"causal": causal, "window": window, "scale": 0.3}

    def op(**tensors):
        o, lse = softmax_attention(
            **tensors, **arguments, cu_seqlens=q_ends, cu_seqlens_k=k_ends, return_lse=True
        )
        return (o, finite(lse)) if with_lse else o

    def plain(**tensors):
        o, lse = definition(**tensors, **arguments, q_ends=q_ends, k_ends=k_ends)
        return (o, finite(lse)) if with_lse else o

    inputs = packed_inputs(*lengths, Hq=4, Hk=2, D=D, Dv=Dv)
    assert_agrees(op, plain, inputs, dtype=dtype, rows_used=int(q_ends[-1]))


@pytest.mark.parametrize(("Hq", "Hk", "D", "Dv"), [(1, 1, 5, 5), (6, 1, 8, 3), (6, 3, 16, 40)])
def test_head_counts_and_widths(Hq, Hk, D, Dv):
    torch.manual_seed(0)
    lengths = [9, 33]
    ends = bounds(lengths)

    def op(**tensors):
        return softmax_attention(**tensors, cu_seqlens=ends, return_lse=True)

    def plain(**tensors):
        return definition(
            **tensors, q_ends=ends, k_ends=ends, causal=True, window=None, scale=D**-0.5
        )

    inputs = packed_inputs(lengths, lengths, Hq, Hk, D, Dv)
    inputs = {name: x[:, : sum(lengths)] for name, x in inputs.items()}
    assert_agrees(op, plain, inputs, dtype=torch.float64)


@pytest.mark.parametrize("T", [0, 1, 65])
def test_batch_rows_are_sequences(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, T, 2, 8, dtype=torch.float64) for _ in range(3))
    o, lse = softmax_attention(q, k, v, return_lse=True)
    for b in range(3):
        rows = (x[b : b + 1] for x in (q, k, v))
        expected = definition(*rows, bounds([T]), bounds([T]), True, None, 8**-0.5)
        assert torch.allclose(o[b : b + 1], expected[0])
        assert torch.allclose(lse[b : b + 1], expected[1])


def test_a_row_that_sees_nothing_is_zero_and_minus_infinity():
    q, k = torch.randn(1, 5, 1, 4), torch.randn(1, 2, 1, 4)
    o, lse = softmax_attention(q, k, k, return_lse=True)
    assert (o[:, :3] == 0).all()
    assert (lse[:, :3] == -torch.inf).all()
    assert lse[:, 3:].isfinite().all()


def test_parts_merge_to_the_whole_with_gradients():
    """What a ring does: two halves of the keys, merged by their log-sum-exp."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 8, dtype=torch.float64) for _ in range(3))

    def in_two(q, k, v):
        old, old_lse = softmax_attention(q, k[:, :24], v[:, :24], causal=False, return_lse=True)
        new, new_lse = softmax_attention(q, k[:, 24:], v[:, 24:], causal=False, return_lse=True)
        lse = torch.logaddexp(old_lse, new_lse)
        return sum(
            part * (part_lse - lse).exp()[..., None]
            for part, part_lse in ((old, old_lse), (new, new_lse))
        )

    def whole(q, k, v):
        ends = bounds([40])
        return definition(q, k, v, ends, ends, False, None, 8**-0.5)[0]

    assert_agrees(in_two, whole, {"q": q, "k": k, "v": v}, dtype=torch.float64)


@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5)])
@pytest.mark.parametrize(("Hq", "Hk", "D", "Dv"), [(4, 2, 8, 5), (3, 1, 5, 9)])
def test_gradients_from_the_results(path, lengths, causal, window, Hq, Hk, D, Dv):
    """In fp64, against autograd; what lies in rows of no sequence is of no matter."""
    torch.manual_seed(0)
    q_ends, k_ends = (bounds(x) for x in lengths)
    inputs = packed_inputs(*lengths, Hq, Hk, D, Dv)
    leaves = [x.requires_grad_() for x in inputs.values()]
    o, lse = definition(*leaves, q_ends, k_ends, causal, window, 0.3)
    do = torch.randn_like(o)
    wanted = torch.autograd.grad(o, leaves, do, allow_unused=True)
    do[:, int(q_ends[-1]) :] = float("nan")
    found = softmax_attention_backward(
        do,
        *(x.detach() for x in (*leaves, o, lse)),
        cu_seqlens=q_ends,
        cu_seqlens_k=k_ends,
        causal=causal,
        window=window,
        scale=0.3,
    )
    for leaf, gradient, expected in zip(leaves, found, wanted, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(
            gradient, torch.zeros_like(leaf) if expected is None else expected
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_parts_of_the_keys_are_parts_of_the_gradients(dtype):
    """What a ring does backward: a part knows o and lse of whole rows, and no other part."""
    torch.manual_seed(0)
    ends = bounds([40])
    leaves = [torch.randn(1, 40, heads, 8, requires_grad=True).double() for heads in (4, 2, 2)]
    o, lse = definition(*leaves, ends, ends, False, None, 8**-0.5)
    do = torch.randn_like(o)
    wanted = torch.autograd.grad(o, leaves, do)
    do, q, k, v, o = (x.detach().to(dtype) for x in (do, *leaves, o))
    lse = lse.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    one, two = (
        softmax_attention_backward(do, q, k[:, part], v[:, part], o, lse, causal=False)
        for part in (slice(0, 24), slice(24, 40))
    )
    found = (
        one[0] + two[0],
        *(torch.cat(both, dim=1) for both in zip(one[1:], two[1:], strict=True)),
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for gradient, expected in zip(found, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - expected).abs().max() < tolerance * expected.abs().max()


def test_results_of_another_shape_are_refused():
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"lse \(1, 3, 4\)"):
        softmax_attention_backward(q, q, k, k, q, torch.zeros(1, 4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 4)}, "4 dims"),
        ({"k": torch.zeros(1, 3, 3, 8), "v": torch.zeros(1, 3, 3, 8)}, "a divisor of 4 heads"),
        ({"v": torch.zeros(1, 2, 2, 8)}, "v must be"),
        ({"v": torch.zeros(1, 3, 2, 8).half()}, "one floating dtype"),
        ({"window": 0}, "window is 0"),
        ({"window": 2, "causal": False}, "causal=False"),
        ({"cu_seqlens_k": torch.tensor([0, 3])}, "cannot come alone"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "at most 3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "q": torch.zeros(1, 3, 4, 8),
        "k": torch.zeros(1, 3, 2, 8),
        "v": torch.zeros(1, 3, 2, 8),
    }
    with pytest.raises(ValueError, match=message):
        softmax_attention(**(arguments | change))
