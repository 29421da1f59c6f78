"""The launches of the recurrence that are compiled ahead of time: every kind of mixer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.triton.launch import DTYPES, Launch, recording
from kernels.triton.linear_attention import backward, forward, forward_with_maps
from kernels.triton.tiles import NONE, SCALAR, VECTOR

# (mixer, kind of decay, delta rule, head dim).
CASES = [
    ("linear", NONE, False, 128),
    ("mamba2", SCALAR, False, 128),
    ("gla", VECTOR, False, 128),
    ("deltanet", NONE, True, 128),
    ("gated_deltanet", SCALAR, True, 64),
    ("gated_deltanet", SCALAR, True, 128),
    ("gated_deltanet", SCALAR, True, 256),
    ("kda", VECTOR, True, 64),
    ("kda", VECTOR, True, 128),
]


def shipped(arch: str) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every kernel of a forward and backward pass, in dtypes of training: none
    may spill."""
    for mixer, kind, delta, D in CASES:
        yield from _launches(arch, mixer, kind, delta, D, torch.bfloat16)
        if D <= 128:
            yield from _launches(arch, mixer, kind, delta, D, torch.float16)


def spilling(arch: str) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of further kernels that users may need, and that may spill: fp32, which is for
    checking and is multiplied outside of tensor cores; fp16 with heads of 256, whose operands are
    tf32 and twice as wide; a vector decay with wider heads than known models have."""
    for mixer, kind, delta, D in CASES:
        if D > 128:
            yield from _launches(arch, mixer, kind, delta, D, torch.float16)
        yield from _launches(arch, mixer, kind, delta, D, torch.float32)
    for dtype in DTYPES:
        yield from _launches(arch, "kda", VECTOR, True, 256, dtype)


def _launches(
    arch: str, mixer: str, kind: int, delta: bool, D: int, dtype: torch.dtype
) -> Iterator[tuple[str, Launch]]:
    B, T, H = 2, 4096, 16

    def x(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    decay_shape = {NONE: (), SCALAR: (B, T, H), VECTOR: (B, T, H, D)}[kind]
    decay = x(*decay_shape, dtype=torch.float32) if decay_shape else None
    beta = x(B, T, H, dtype=torch.float32) if delta else None
    state = x(B, H, D, D, dtype=torch.float32)
    with recording(arch) as launches:
        q, k, v = (x(B, T, H, D) for _ in range(3))
        inputs = (q, k, v, decay, beta, 1.0, state, None)
        o, final_state, kept = forward(*inputs)
        backward(*inputs, kept, o, final_state)
        if delta:  # else it launches nothing more
            forward_with_maps(q, k, v, decay, beta, 1.0, None)
    name = f"{mixer} D{D} {str(dtype).removeprefix('torch.')}"
    for launched in launches:
        given = dict(zip(launched.kernel.arg_names, launched.args, strict=False))
        what = " states" if "o" in given and given["o"] is None else ""
        if launched.constants.get("VALUES", D) != launched.constants.get("DV", D):
            what = " maps"
        yield f"{name} {launched.kernel.__name__}{what}", launched
