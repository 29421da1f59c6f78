"""Validation over ranks: each counts its tokens, and every rank has the numbers of all."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data import Batch
from parallel import ParallelConfig, Planner, Shard, World
from train.evaluation.evaluate import evaluate

LENGTHS = [[5, 1, 3, 8], [40]]
BYTES = np.arange(61) % 4


def batches() -> list[Batch]:
    made = []
    for lengths in LENGTHS:
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        labels = np.arange(cu_seqlens[-1]) * 7 % 61
        labels[cu_seqlens[1:] - 1] = -100
        made.append(Batch(np.arange(cu_seqlens[-1]) % 61, labels, cu_seqlens))
    return made


class Engine:
    """A model whose loss is a function of the label, and which is right where that is even."""

    training = True

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def __call__(self, tokens: Tensor, labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        assert not self.training
        wanted = labels >= 0
        return (1.0 + labels) * wanted, wanted & (labels % 2 == 0)


def validated(world: World, gives_up: bool) -> tuple[dict[str, Any] | None, bool]:
    engine: Any = Engine()
    with closing(Planner(ParallelConfig(), world.topology)) as planner:
        row = evaluate(engine, batches(), BYTES, world, planner, lambda: gives_up)
    return row, engine.training


@pytest.mark.parametrize("gives_up", [False, True])
def test_every_rank_has_the_numbers_of_all(ranks, gives_up: bool) -> None:
    labels = np.concatenate([batch.labels[batch.labels >= 0] for batch in batches()])
    row, training = validated(World(0, 1, 0, torch.device("cpu")), gives_up)
    assert training
    if gives_up:
        assert row is None
    else:
        assert row is not None
        assert row["val_loss"] == pytest.approx((1.0 + labels).mean())
        assert row["val_accuracy"] == pytest.approx((labels % 2 == 0).mean())
        bits = (1.0 + labels).sum() / np.log(2)
        assert row["val_bpb"] == pytest.approx(bits / BYTES[labels].sum())
    assert ranks(2).run(validated, gives_up) == [(row, True)] * 2
