"""First values of parameters: each number a function of (seed, parameter's name, its position).

So any rank makes any part of any parameter by itself, and gets what every other rank, ZeRO stage
and replica gets. Numbers are drawn on the CPU in fp32, whatever the device and the dtype.

A module declares what a parameter begins as where it makes it:

    self.A_log = declared(Uniform(1, 16, then=torch.log), heads)

A buffer has its first value in its attribute `first`. Parameters and buffers that declare nothing
are matrices, which `Model` gives a normal distribution, or biases, which begin at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_BLOCK = 1 << 17  # numbers made at a time: their temporaries stay in a core's cache


class First(Protocol):
    """What a parameter begins as."""

    def part(self, stream: Stream, begin: int, end: int) -> Tensor:
        """(end − begin,) fp32: elements begin to end of the flattened parameter."""


@dataclass(frozen=True)
class Constant:
    value: float

    def part(self, stream: Stream, begin: int, end: int) -> Tensor:
        return torch.full((end - begin,), self.value)


@dataclass(frozen=True)
class Normal:
    """Of mean 0; its tails end at 5.4 standard deviations."""

    std: float

    def part(self, stream: Stream, begin: int, end: int) -> Tensor:
        return stream.uniform(begin, end).erfinv_().mul_(self.std * math.sqrt(2))


@dataclass(frozen=True)
class Uniform:
    """`then`, an element-wise function, of numbers that are uniform between `low` and `high`."""

    low: float
    high: float
    then: Callable[[Tensor], Tensor] = torch.Tensor.contiguous

    def part(self, stream: Stream, begin: int, end: int) -> Tensor:
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return self.then(stream.uniform(begin, end).mul_(half).add_(middle))


@dataclass(frozen=True)
class Identity:
    """Identity matrices: of a parameter (…, size, size)."""

    size: int

    def part(self, stream: Stream, begin: int, end: int) -> Tensor:
        within = torch.arange(begin, end) % self.size**2
        return (within % (self.size + 1) == 0).float()


class Stream:
    """Random numbers of one parameter, by position.

    Those of Philox 4×64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which
    computes any of its numbers without those before: the key is a digest of seed and name, and
    element i has half of the (i // 2)-th number.
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
        self._key = int.from_bytes(digest, "little")

    def uniform(self, begin: int, end: int) -> Tensor:
        """(end − begin,) fp32 inside (−1, 1), the ends left out: odd multiples of 2^−24."""
        counter = begin // 8  # which stands for four numbers of 64 bits
        numbers = np.random.Philox(key=self._key, counter=counter).random_raw(
            -(-(end - 8 * counter) // 2)
        )
        bits = torch.from_numpy(numbers.view(np.int32)[begin - 8 * counter : end - 8 * counter])
        return (bits >> 8).float().add_(0.5).mul_(2.0**-23)


def declared(first: First, *shape: int) -> nn.Parameter:
    """A parameter that begins as `first` says, in any model and, with seed 0, in a module alone."""
    made = nn.Parameter(torch.empty(shape))
    made.first = first  # type: ignore[attr-defined]
    if not made.is_meta:
        made.data.copy_(values(first, 0, "", 0, made.numel()).view(shape))
    return made


def declarations(module: nn.Module) -> dict[str, First]:
    """What parameters and buffers of a module declare, by name."""
    return {
        name: tensor.first
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if hasattr(tensor, "first")
    }


def values(first: First, seed: int, name: str, begin: int, end: int) -> Tensor:
    """(end − begin,) fp32: elements begin to end of the flattened parameter called `name`."""
    out, stream = torch.empty(end - begin), Stream(seed, name)
    for a in range(begin, end, _BLOCK):
        b = min(a + _BLOCK, end)
        out[a - begin : b - begin] = first.part(stream, a, b)
    return out


@contextmanager
def without_values() -> Iterator[None]:
    """Inside this context modules are made on `meta`, with shapes and no memory."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Modules draw no values: on `meta`, torch would import its compiler to draw nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fill(module: nn.Module, firsts: Mapping[str, First], seed: int) -> None:
    """Set those parameters and buffers of a module that `firsts` names."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in firsts:
            made = values(firsts[name], seed, name, 0, tensor.numel())
            tensor.copy_(made.view(tensor.shape))
