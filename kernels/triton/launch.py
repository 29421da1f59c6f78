"""Launch parameters: block widths, warps and stages, by architecture, dtype and head dim.

A table and no tuner: nothing is timed at run time, a second run compiles nothing, and
`python -m kernels compile` can show every row's registers and shared memory without a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """What one kernel is launched with."""

    BLOCK_K: int
    BLOCK_V: int
    num_warps: int
    num_stages: int


# What ops take, each compiled ahead of time.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    """One kernel launch, as it was asked for."""

    kernel: Any  # the jitted function
    args: tuple[Any, ...]
    constants: dict[str, Any]  # compile-time arguments, num_warps and num_stages


class _Recording(NamedTuple):
    arch: str
    launches: list[Launch]


_recordings: list[_Recording] = []


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect launches as on that architecture instead of making them.

    An op that runs on meta tensors inside shows which kernels it would launch and how: that is
    how the ahead-of-time compile knows what is shipped, with no second list to keep.
    """
    _recordings.append(_Recording(arch, []))
    try:
        yield _recordings[-1].launches
    finally:
        _recordings.pop()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel, unless its grid is empty."""
    if _recordings:
        _recordings[-1].launches.append(Launch(kernel, args, constants))
    elif all(grid):
        kernel[grid](*args, **constants)


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …; "interpreter" for a CPU."""
    if _recordings:
        return _recordings[-1].arch
    if device.type != "cuda":
        return "interpreter"
    return _of_gpu(device)


@cache
def _of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    if properties.major == 9:
        from triton import knobs
        from triton.backends.nvidia.compiler import get_ptxas

        path = sound_assembler(get_ptxas(90), knobs.nvidia.ptxas_blackwell)
        os.environ["TRITON_PTXAS_PATH"] = path
    return f"sm_{properties.major}{properties.minor}"


def sound_assembler(own: Any, newer: Any) -> str:
    """The path of a `ptxas` that is safe for Hopper: Triton's own choice, or one beside it.

    ptxas before 13.1 gives registers that an asynchronous wgmma still reads to somebody else
    (triton issue 11366, pull request 11781): with 12.8 the gradients of heads 256 wide with a
    vector decay were off by their own size on an H100, and with 13.4 right. Triton up to 3.8
    takes it, and carries a newer one for Blackwell.

    Args:
        own, newer: with a `path` and a `version` such as "12.8".

    Raises:
        RuntimeError: neither is new enough.
    """
    for tool in (own, newer):
        if tuple(int(part) for part in tool.version.split(".")[:2]) >= (13, 1):
            return str(tool.path)
    raise RuntimeError(
        f"Triton {triton.__version__} assembles Hopper code with ptxas {own.version}, which gives "
        "wrong gradients; install triton 3.7.1 or newer, or set TRITON_PTXAS_PATH to a ptxas of "
        "CUDA 13.1 or newer"
    )


def precision(dtype: torch.dtype, arch: str) -> str:
    """How a chunk's products are made for inputs of that dtype.

    fp16 tensors are multiplied as tf32: its mantissa is as long, and states and loss-scaled
    gradients leave the range of fp16. fp32 is fp32: three tf32 products for one came to three
    times the error of plain torch on an H100.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if dtype == torch.float16 and arch.startswith("sm_") else "ieee"


def padded(width: int) -> int:
    """The block that holds a head dim: a power of two that tensor cores can multiply."""
    return max(16, 1 << (width - 1).bit_length())


def blocks(kernel: str, arch: str, dtype: torch.dtype, DK: int, DV: int, vector: bool) -> Blocks:
    """The launch of one kernel; on sm_90 the fastest of those tried on an H100, but for the
    products over pairs of a vector decay, which have become fewer since.

    The passes over a sequence keep a state of BLOCK_K × BLOCK_V in registers, beside tiles of
    64 × BLOCK_K: columns are halved where heads or operands are wide. They wait for memory more
    than for anything: a third stage took up to 43 % off them on an H100. sm_80 multiplies
    operands from registers, and each of its warps holds a whole one: twice the warps, half the
    columns.
    """
    K, V = padded(DK), padded(DV)
    wide = dtype != torch.bfloat16 and arch.startswith("sm_")
    exact = dtype == torch.float32 and arch.startswith("sm_")  # no tensor cores: all in registers
    ampere = arch == "sm_80"
    if kernel in ("forward", "backward"):
        narrow = wide or K > 128 or (vector and arch != "sm_90")
        narrow = narrow or (ampere and kernel == "backward" and K > 64)
        many = wide or K > 128 or ampere or (narrow and K > 64)
        warps = 16 if exact and K > 128 else 8 if many else 4
        crowded = (vector and K > 128) or arch.startswith("gfx")  # which has 64 KB to share
        stages = 1 if crowded else 3 if arch == "sm_90" and K <= 128 else 2
        if wide:  # A second stage takes loads of fp16 past the registers that are scarce then.
            staged = kernel == "forward" or not (vector or ampere)
            stages = 2 if dtype == torch.float16 and K > 64 and staged else 1
        return Blocks(K, min(V, 16 if narrow else 32), warps, stages)
    # One stage: with more, the loads of `gradients` race with the products on an H100.
    hopper = arch == "sm_90" and not wide
    if kernel == "intra":
        if vector:
            return Blocks(min(K, 16 if exact or (ampere and wide) else 32), V, 8, 1)
        if ampere and K > 128 and not wide:  # fewer columns spill under Triton 3.7.1 or 3.9
            return Blocks(128, V, 8, 1)
        return Blocks(min(K, 32 if wide else 64 if ampere else 128), V, 8 if wide else 4, 1)
    # More than one block of columns: the loop over them is what keeps its loads apart.
    if exact:
        return Blocks(min(K, 16), min(V, 32), 8, 1)
    if ampere:
        warps = 8 if wide or (vector and kernel == "gradients") else 4
        return Blocks(min(K, 32), min(V, 32), warps, 1)
    if kernel == "pair_gradients":
        side, warps = (64, 8) if wide else (128, 4)
        return Blocks(min(K, side), min(V, side), warps, 1)
    if vector and hopper:
        return Blocks(min(K, 32), min(V, 128), 8, 1)
    warps = 4 if hopper and K <= 128 else 8
    return Blocks(min(K, 32 if vector else 64), min(V, 64 if V > 64 else 32), warps, 1)
