"""One layer over shards on several ranks, against the same layer over the whole stream.

Functions here run on every rank; a test hands them to its ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from parallel import FullAttention, ParallelConfig, Planner, Shard, World, distribute
from parallel.planning.layout import Plan
from parallel.planning.plan import plan

# Streams of every shape: a sequence over all ranks, many short ones, a mixture, lengths
# divisible by nothing, shards of one to three tokens, fewer tokens than ranks.
STREAMS = [
    [67],
    [3, 1, 2, 4, 1, 3, 5, 2, 1, 1, 4],
    [1, 40, 2, 0, 17, 5, 1, 23],
    [13, 61, 7],
    [5],
    [2, 5, 1],
    [1, 0, 1],
]


def plans_in_waves(waves: int) -> AbstractContextManager[object]:
    """Inside this context every plan has `waves` waves of heads."""

    def planned(*arguments: Any, **more: Any) -> Plan:
        return dataclasses.replace(plan(*arguments, **more), waves=waves)

    return mock.patch("parallel.planning.planner.plan", planned)


@contextmanager
def lopsided_shards() -> Iterator[None]:
    """Inside this context every plan has shards of very different sizes; none is empty."""

    def shards(held: np.ndarray, _slowness: np.ndarray) -> np.ndarray:
        weights = np.array([1, 4, 2, 3])[: len(held)]
        ends = (int(held.sum()) - len(held)) * np.cumsum(weights) // weights.sum()
        return 1 + np.diff(ends, prepend=0)

    with (
        mock.patch("parallel.planning.building.even_shards", shards),
        mock.patch("parallel.planning.plan._fits", return_value=True),
    ):
        yield


def noting(told: list[str], owner: type, name: str, what: str) -> AbstractContextManager[object]:
    """Inside this context calls of `owner.name` append `what` to `told`."""
    real = getattr(owner, name)

    def noted(*arguments: Any) -> Any:
        told.append(what)
        return real(*arguments)

    return mock.patch.object(owner, name, noted)


Layer = Callable[[dict[str, Tensor], Shard], Tensor]
Whole = Callable[[dict[str, Tensor], Tensor], Tensor]


def difference(
    world: World,
    lengths: list[int],
    rows: dict[str, Tensor],
    weights: dict[str, Tensor],
    layer: Layer,
    whole: Whole,
    config: ParallelConfig,
    model: FullAttention | None = None,
) -> float:
    """The largest error of the output or of any gradient on this rank, in units of its scale.

    Args:
        rows: tensors (1, T, …), one row a token of the stream; weights: tensors that all
            tokens share. Both are the same on all ranks.
        layer: from the rank's rows and the weights to its rows of the output.
        whole: the same from all rows and `cu_seqlens`, on one process.
        model: what the planner knows of the model.
    """
    total = sum(lengths)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    number = np.arange(total)
    with closing(Planner(config, world.topology, model)) as planner:
        mine, labels, shard = distribute(number, number, cu_seqlens, world, config, planner)
    real = (labels >= 0)[:, None]  # not the tokens that fill up a short stream

    (wanted, dwanted, gradients) = _on_first(
        world, lambda: _definition(rows | weights, whole, torch.tensor(cu_seqlens))
    )
    local = {name: x[:, mine].clone().requires_grad_() for name, x in rows.items()}
    shared = {name: x.clone().requires_grad_() for name, x in weights.items()}
    got = layer(local | shared, shard)
    dgot = dwanted[:, mine]
    got.backward(dgot * real.reshape(1, -1, *[1] * (dgot.dim() - 2)))

    errors = [_error(got[:, real[:, 0]], wanted[:, mine[real[:, 0]]])]
    for name, x in local.items():
        errors.append(_error(x.grad[:, real[:, 0]], gradients[name][:, mine[real[:, 0]]]))
    for name, x in shared.items():
        errors.append(_error(world.sum(x.grad), gradients[name]))
    return max(errors)


def _definition(
    given: dict[str, Tensor], whole: Whole, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The output over the whole stream, a gradient of it, and those of what is given."""
    given = {name: x.clone().requires_grad_() for name, x in given.items()}
    o = whole(given, cu_seqlens)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    gradients = torch.autograd.grad(o, list(given.values()), do)
    return o.detach(), do, dict(zip(given, gradients, strict=True))


def _on_first(world: World, made: Callable[[], Any]) -> Any:
    """What `made` makes, made by one rank alone."""
    made_here = [made() if world.rank == 0 else None]
    if world.size > 1:
        torch.distributed.broadcast_object_list(made_here, 0)
    return made_here[0]


def _error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    if not got.numel():
        return 0.0
    assert got.isfinite().all()
    return float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
