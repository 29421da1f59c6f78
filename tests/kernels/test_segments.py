"""The affine map of a segment against the final state of `linear_attention`'s definition."""

from functools import partial, reduce
from itertools import pairwise

import pytest
import torch

from kernels.segments import apply_segment, compose_segments, segment_state
from tests.kernels.agreement import assert_agrees, assert_close, bounds
from tests.kernels.test_linear_attention import KEEP_FP32, ROWS, cut, reference, tokens


def tokens_without_q(*args, **kwargs):
    return {name: x for name, x in tokens(*args, **kwargs).items() if name != "q"}


def final_state(k, v, decay, beta, initial_state, cu_seqlens=None):
    return reference(k, k, v, decay, beta, initial_state=initial_state, cu_seqlens=cu_seqlens)[1]


def mapped_state(initial_state, **segment):
    return apply_segment(*segment_state(**segment), initial_state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_the_map_of_a_segment_gives_its_final_state(decay, delta, dtype, poisoned_memory):
    inputs = tokens_without_q(decay, delta, 67, B=2, Dk=20, Dv=12, strength=0.1)
    assert_agrees(mapped_state, final_state, inputs, dtype=dtype, keep_fp32=KEEP_FP32)


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_packed_segments_have_a_map_each(decay, delta):
    lengths = [0, 1, 40, 0, 33]
    inputs = tokens_without_q(decay, delta, 80, N=len(lengths))
    cu_seqlens = bounds(lengths)
    assert_agrees(
        partial(mapped_state, cu_seqlens=cu_seqlens),
        partial(final_state, cu_seqlens=cu_seqlens),
        inputs,
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_the_map_is_a_factor_a_diagonal_or_a_matrix(decay, delta):
    inputs = tokens_without_q(decay, delta, 40, Dk=20, Dv=12)
    del inputs["initial_state"]
    M, E = segment_state(**{n: x if x is None else x.bfloat16() for n, x in inputs.items()})
    shape = (1, 2, 20, 20) if delta else (1, 2, 20) if decay == "vector" else (1, 2)
    assert (M.shape, M.dtype) == (shape, torch.float32)
    assert (E.shape, E.dtype) == ((1, 2, 20, 12), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_maps_of_fragments_compose_to_the_map_of_the_whole(decay, delta, dtype):
    ends = [0, 1, 1, 17, 33, 65, 66, 90, 100]

    def by_fragments(initial_state, **whole):
        fragments = [segment_state(**cut(whole, start, end)) for start, end in pairwise(ends)]
        one_by_one = reduce(lambda state, f: apply_segment(*f, state), fragments, initial_state)
        from_the_left = reduce(lambda first, second: compose_segments(second, first), fragments)
        from_the_right = reduce(compose_segments, reversed(fragments))
        return (
            one_by_one,
            apply_segment(*from_the_left, initial_state),
            apply_segment(*from_the_right, initial_state),
        )

    assert_agrees(
        by_fragments,
        lambda **whole: (final_state(**whole),) * 3,
        tokens_without_q(decay, delta, 100, strength=0.05),
        dtype=dtype,
        keep_fp32=KEEP_FP32,
    )


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_an_empty_segment_is_the_identity(decay, delta):
    inputs = tokens_without_q(decay, delta, 0, B=2)
    state = inputs.pop("initial_state")
    assert torch.equal(apply_segment(*segment_state(**inputs), state), state)


@pytest.mark.parametrize("log_decay", [-20.0, -1e4])
@pytest.mark.parametrize("delta", [False, True])
def test_a_decay_to_zero_leaves_a_finite_map(delta, log_decay):
    inputs = tokens_without_q("vector", delta, 67)
    inputs["decay"][:, 30:40] = log_decay
    assert_agrees(mapped_state, final_state, inputs, dtype=torch.float32)


def test_autocast_leaves_maps_alone():
    inputs = {n: x.float() for n, x in tokens_without_q("scalar", True, 40).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = mapped_state(**inputs)
    assert_close(under_autocast, mapped_state(**inputs), torch.float32, "state")


def test_arguments_that_do_not_fit_are_named_with_their_value():
    inputs = tokens_without_q("scalar", True, 9)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match=r"\(1, 9, 1\)"):
        segment_state(**{**inputs, "beta": torch.zeros(1, 9, 1)})
    with pytest.raises(ValueError, match="10"):
        segment_state(**inputs, cu_seqlens=torch.tensor([0, 10]))
