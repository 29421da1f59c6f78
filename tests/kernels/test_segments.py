"""The affine map of a segment against the final state of `linear_attention`'s definition."""

from functools import reduce
from itertools import pairwise

import pytest
import torch

from kernels.recurrences import LinearAttention, Packed
from kernels.segments import apply_segment, compose_segments
from tests.kernels.agreement import assert_close, bounds
from tests.kernels.test_linear_attention import KEEP_FP32, ROWS, cut, reference, tokens


def tokens_and_state(*args, **kwargs):
    inputs = tokens(*args, **kwargs)
    return inputs, inputs.pop("initial_state")


def maps(inputs, lengths=None, dtype=torch.float64):
    """M and E of each segment."""
    lengths = (inputs["k"].shape[1],) if lengths is None else tuple(lengths)
    packed = Packed(lengths, None if len(lengths) == 1 else bounds(lengths))
    dtypes = dict.fromkeys(inputs, dtype) | dict.fromkeys(
        KEEP_FP32, torch.promote_types(dtype, torch.float32)
    )
    given = tuple(None if x is None else x.to(dtypes[name]) for name, x in inputs.items())
    begun = LinearAttention(backend="torch").begin(given, packed)
    return begun.M, begun.E


def final_state(inputs, state, lengths=None):
    cu_seqlens = None if lengths is None else bounds(lengths)
    return reference(**inputs, initial_state=state, cu_seqlens=cu_seqlens)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_the_map_of_a_segment_gives_its_final_state(decay, delta, dtype, poisoned_memory):
    inputs, state = tokens_and_state(decay, delta, 67, Dk=20, Dv=12, strength=0.1)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].to(dtype).double()
    M, E = maps(inputs, dtype=dtype)
    assert_close(apply_segment(M, E, state.to(E)), final_state(inputs, state), dtype, "M S + E")


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_packed_segments_have_a_map_each(decay, delta, poisoned_memory):
    lengths = [0, 1, 40, 0, 33]
    inputs, state = tokens_and_state(decay, delta, sum(lengths), N=len(lengths))
    mapped = apply_segment(*maps(inputs, lengths), state)
    assert_close(mapped, final_state(inputs, state, lengths), torch.float64, "M S + E")


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_the_map_is_a_factor_a_diagonal_or_a_matrix(decay, delta):
    inputs, _ = tokens_and_state(decay, delta, 40, Dk=20, Dv=12)
    M, E = maps(inputs, dtype=torch.bfloat16)
    shape = (1, 2, 20, 20) if delta else (1, 2, 20) if decay == "vector" else (1, 2)
    assert (M.shape, M.dtype) == (shape, torch.float32)
    assert (E.shape, E.dtype) == ((1, 2, 20, 12), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_maps_of_fragments_compose_to_the_map_of_the_whole(decay, delta, dtype):
    ends = [0, 1, 1, 17, 33, 65, 66, 90, 100]
    inputs, state = tokens_and_state(decay, delta, 100, strength=0.05)
    fragments = [maps(cut(inputs, start, end), dtype=dtype) for start, end in pairwise(ends)]
    wanted = final_state(inputs, state)
    first = state.to(dtype)
    one_by_one = reduce(lambda state, f: apply_segment(*f, state), fragments, first)
    assert_close(one_by_one, wanted, dtype, "one by one")
    from_the_left = reduce(lambda first, second: compose_segments(second, first), fragments)
    assert_close(apply_segment(*from_the_left, first), wanted, dtype, "from the left")
    from_the_right = reduce(compose_segments, reversed(fragments))
    assert_close(apply_segment(*from_the_right, first), wanted, dtype, "from the right")


@pytest.mark.parametrize(("decay", "delta"), ROWS)
def test_an_empty_segment_is_the_identity(decay, delta):
    inputs, state = tokens_and_state(decay, delta, 0)
    assert torch.equal(apply_segment(*maps(inputs), state), state)


@pytest.mark.parametrize("log_decay", [-20.0, -1e4])
@pytest.mark.parametrize("delta", [False, True])
def test_a_decay_to_zero_leaves_a_finite_map(delta, log_decay):
    inputs, state = tokens_and_state("vector", delta, 67)
    inputs["decay"][:, 30:40] = log_decay
    mapped = apply_segment(*maps(inputs, dtype=torch.float32), state.float())
    assert mapped.isfinite().all()
    assert_close(mapped, final_state(inputs, state), torch.float32, "M S + E")


def test_autocast_leaves_maps_alone():
    inputs, state = tokens_and_state("scalar", True, 40)

    def mapped():
        return apply_segment(*maps(inputs, dtype=torch.float32), state.float())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = mapped()
    assert_close(under_autocast, mapped(), torch.float32, "state")
