"""Launch parameters: block widths, warps and stages, by architecture, dtype and head dim.

They are a table (`blocks`), not a tuner's result: nothing is timed at run time, a second run
compiles nothing, and `python -m kernels compile` lists every entry's registers and shared memory
without a GPU. `recording` collects launches instead of making them, for that command.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, MutableSequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """Launch parameters of one kernel of the recurrence."""

    BLOCK_K: int
    BLOCK_V: int
    num_warps: int
    num_stages: int


# Dtypes that ops take in Triton; each is compiled ahead of time.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    """One kernel launch with its arguments."""

    kernel: Any  # the jitted function
    args: tuple[Any, ...]
    constants: dict[str, Any]  # compile-time arguments, num_warps and num_stages


class _Recording(NamedTuple):
    arch: str
    launches: MutableSequence[Launch]


_recordings: list[_Recording] = []


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Inside this context, launches are collected as for `arch` instead of made.

    An op that runs on meta tensors here shows which kernels it launches and how. So the
    ahead-of-time compile needs no list of its own.
    """
    launches: list[Launch] = []
    _recordings.append(_Recording(arch, launches))
    try:
        yield launches
    finally:
        _recordings.pop()


@contextlib.contextmanager
def launching_nothing(arch: str) -> Iterator[None]:
    """As `recording`, but nothing is collected: launches would keep their tensors alive."""
    _recordings.append(_Recording(arch, deque(maxlen=0)))
    try:
        yield
    finally:
        _recordings.pop()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel, unless its grid is empty."""
    if _recordings:
        _recordings[-1].launches.append(Launch(kernel, args, constants))
    elif all(grid):
        kernel[grid](*args, **constants)


def architecture(device: torch.device) -> str:
    """The device's architecture: "sm_90", "gfx942", …; "interpreter" for a CPU."""
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
    """The path of a `ptxas` that compiles correctly for Hopper: `own`, else `newer`.

    ptxas before 13.1 reuses registers that an asynchronous wgmma still reads (triton issue 11366,
    pull request 11781): on an H100 gradients of heads 256 wide with a vector decay had errors of
    their own size with 12.8, and were right with 13.4. Triton up to 3.8 takes the old one for
    Hopper, and carries a newer one for Blackwell.

    Args:
        own, newer: tools with a `path` and a `version` such as "12.8".

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
    """The precision of a chunk's products, for inputs of that dtype: "bf16", "tf32" or "ieee".

    fp16 inputs are multiplied as tf32, whose mantissa is as long: states and loss-scaled gradients
    exceed the range of fp16. fp32 is multiplied as fp32. Three tf32 products in place of one were
    tried and left: on an H100 their error was three times that of plain torch.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if dtype == torch.float16 and arch.startswith("sm_") else "ieee"


def padded(width: int) -> int:
    """The block width that holds a head dim: a power of two, at least 16 for tensor cores."""
    return max(16, 1 << (width - 1).bit_length())


def blocks(kernel: str, arch: str, dtype: torch.dtype, DK: int, DV: int, vector: bool) -> Blocks:
    """Launch parameters of one kernel of the recurrence.

    On sm_90 they are the fastest of those tried on an H100. (The products over pairs of a vector
    decay have become fewer since then.)

    "forward" and "backward", the passes over a sequence, keep a state of BLOCK_K × BLOCK_V in
    registers beside tiles of 64 × BLOCK_K, so BLOCK_V is halved for wide heads or operands. They
    mostly wait for memory: a third stage took up to 43 % off their time on an H100. sm_80
    multiplies operands from registers, and each of its warps holds a whole one: it has twice the
    warps and half the columns.
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
        crowded = (vector and K > 128) or arch.startswith("gfx")  # gfx942: 64 KB of shared memory
        stages = 1 if crowded else 3 if arch == "sm_90" and K <= 128 else 2
        if wide:  # A second stage loads fp16 past the registers, which are scarce here.
            staged = kernel == "forward" or not (vector or ampere)
            stages = 2 if dtype == torch.float16 and K > 64 and staged else 1
        return Blocks(K, min(V, 16 if narrow else 32), warps, stages)
    # One stage from here on: with two, dq of `gradients` had a race on an H100.
    hopper = arch == "sm_90" and not wide
    if kernel == "intra":
        if vector:
            return Blocks(min(K, 16 if exact or (ampere and wide) else 32), V, 8, 1)
        # Fewer columns spill, under Triton 3.7.1 or under 3.9.
        if ampere and K > 128 and not wide:
            return Blocks(128, V, 8, 1)
        return Blocks(min(K, 32 if wide else 64 if ampere else 128), V, 8 if wide else 4, 1)
    # Several blocks of columns a head: the loop over them keeps loads from being in flight at once.
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
