"""Full attention over a cut stream: output and every gradient as on one process."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

import parallel
from parallel import ParallelConfig, Shard, World
from parallel.config import Attention
from tests.parallel.across import STREAMS, difference

STRATEGIES = typing.get_args(Attention)
DIM = 8


def attention(
    world: World, lengths: list[int], heads: int, kv_heads: int, strategy: str, window: int | None
) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: torch.randn(1, sum(lengths), count, DIM, dtype=torch.float64, generator=generator)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }

    def layer(x: dict[str, Tensor], shard: Shard) -> Tensor:
        return parallel.softmax_attention(x["q"], x["k"], x["v"], shard, window=window)

    def whole(x: dict[str, Tensor], cu_seqlens: Tensor) -> Tensor:
        k, v = (x[name].repeat_interleave(heads // kv_heads, dim=2) for name in "kv")
        scores = torch.einsum("bihd,bjhd->bhij", x["q"], k) * DIM**-0.5
        place = torch.arange(sum(lengths))
        sequence = torch.bucketize(place, cu_seqlens[1:], right=True)
        seen = (sequence[:, None] == sequence) & (place <= place[:, None])
        if window is not None:
            seen &= place > place[:, None] - window
        scores = scores.masked_fill(~seen, float("-inf"))
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    config = ParallelConfig(attention=strategy)  # type: ignore[arg-type]
    return difference(world, lengths, rows, {}, layer, whole, config)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_strategy_equals_one_softmax(
    ranks, size: int, lengths: list[int], strategy: str
) -> None:
    """fp64: to 1e-10."""
    assert max(ranks(size).run(attention, lengths, 4, 2, strategy, None)) < 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("window", [1, 6, 50])
@pytest.mark.parametrize("size", [2, 4])
def test_a_sliding_window_reaches_over_the_cuts(
    ranks, size: int, window: int, strategy: str
) -> None:
    """fp64: to 1e-10."""
    for lengths in STREAMS:
        assert max(ranks(size).run(attention, lengths, 4, 2, strategy, window)) < 1e-10
