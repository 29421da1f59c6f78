"""No op of a step makes the host wait for a device.

Ops whose result the host must read (`item`, `nonzero`, a mask as an index, a copy to the CPU) wait
on a GPU for all that runs there. Without a GPU they can still be seen: every op of a hybrid's
forward and backward pass is watched, and who called it. Kernels for CPUs may read lengths; the
Triton ones, which these tests do not run, have grids made on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import ParallelConfig, World, distribute
from tests.parallel.test_contract import FAMILIES, OPTIM, VOCABULARY, model
from train.experts import AtHome, layers_of

ROOT = Path(__file__).parents[3]
READ_BY_THE_HOST = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.is_nonzero.default,
}
# Of a tensor; dispatch does not see that they read it.
METHODS = ["tolist", "cpu", "numpy"]
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class Watch(TorchDispatchMode):
    """Notes what waits, with the place in this repository that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        masked = func in INDEXING and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        # The sum of the repeats is read unless it is given.
        told = (kwargs or {}).get("output_size") is not None
        if (func in READ_BY_THE_HOST and not told) or masked:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        place = called_from()
        if not place.startswith("kernels"):
            self.waits.append(f"{what} at {place}")

    def __enter__(self) -> Watch:
        self._patches = contextlib.ExitStack()
        for name in METHODS:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._noted(name)))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _noted(self, name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def noted(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
            self.note(name)
            return read(tensor, *arguments, **more)

        return noted


def called_from() -> str:
    frame = sys._getframe(3)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def waits(world: World, family: str | None, attention: str, recompute: bool) -> list[str]:
    world = dataclasses.replace(world, ranks_per_node=2)
    net = model(family, recompute)
    tokens = np.arange(101) % VOCABULARY
    cu_seqlens = np.array([0, 61, 64, 101])
    parallel = ParallelConfig(attention=attention)  # type: ignore[arg-type]
    with Watch() as watch:  # tables that are made once a batch are made here too
        net(*distribute(tokens, tokens, cu_seqlens, world, parallel))[0].backward()
    return watch.waits


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["balanced", "ring", "ulysses", "allgather"])
def test_no_step_of_a_hybrid_waits(ranks, attention: str, recompute: bool) -> None:
    assert ranks(4).run(waits, None, attention, recompute) == [[]] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_of_any_mixer_waits(ranks, family: str) -> None:
    assert ranks(4).run(waits, family, "balanced", False) == [[]] * 4


def waits_of_experts(world: World, recompute: bool) -> list[str]:
    world = dataclasses.replace(world, ranks_per_node=2)
    net = model("experts", recompute)
    AtHome(net, OPTIM, world, torch.float32, dict.fromkeys(layers_of(net), True))
    tokens = np.arange(101) % VOCABULARY
    with Watch() as watch:
        net(*distribute(tokens, tokens, np.array([0, 61, 64, 101]), world))[0].backward()
    return watch.waits


@pytest.mark.parametrize("recompute", [False, True])
def test_where_rows_travel_to_experts_the_host_waits_once_a_layer_and_pass(
    ranks, recompute: bool
) -> None:
    """Of the three layers' MLPs two are experts."""
    for found in ranks(4).run(waits_of_experts, recompute):
        places = [wait.rsplit(":", 1)[0] for wait in found if not wait.startswith("numpy")]
        assert places == ["cpu at parallel/travel/rows.py"] * 2 * (1 + recompute)
        assert len(set(found)) == 2  # the copy to the host, and its view as an array


def test_a_wait_is_seen() -> None:
    with Watch() as watch:
        x = torch.arange(3)
        int(x[1])
        x[x > 1]
        x.nonzero()
        x.tolist()
        x.cpu()
        np.asarray(x)
        torch.repeat_interleave(x)
        torch.repeat_interleave(x, output_size=3)
    assert len(watch.waits) == 7
    assert all("test_no_waiting.py" in wait for wait in watch.waits)
