"""What ranks do together before any layer: who they are, sums, and what one does for all."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from parallel import World, join

SLURM = {"MASTER_ADDR": "n1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}


def told(world: World, first_fails: bool) -> tuple[str, list[str]]:
    """What rank 0 found for all, or the fault that it met; and where the work was done."""
    where = []

    def work() -> str:
        where.append(f"rank {world.rank}")
        if first_fails:
            raise ValueError("no such file")
        return "found"

    try:
        return world.on_first(work), where
    except ValueError as fault:
        return str(fault), where


@pytest.mark.parametrize(("first_fails", "said"), [(False, "found"), (True, "no such file")])
def test_what_rank_0_finds_or_meets_every_rank_has(ranks, first_fails: bool, said: str) -> None:
    assert ranks(2).run(told, first_fails) == [(said, ["rank 0"]), (said, [])]


def together(world: World) -> tuple[list[float], list[int]]:
    return world.sum(torch.tensor([1.0, world.rank])).tolist(), world.gather(10 + world.rank)


def test_sums_and_lists_are_of_all_ranks(ranks) -> None:
    assert ranks(2).run(together) == [([2.0, 1.0], [10, 11])] * 2


def ranks_per_node(_: World, variables: dict[str, str]) -> int:
    with mock.patch.dict(os.environ, variables, clear=True), join() as world:
        return world.ranks_per_node


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (TORCHRUN, 2),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, 1),
        (SLURM, 2),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "8(x4)"}, 8),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "8(x3),4"}, 8),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "1(x2)"}, 1),
    ],
)
def test_a_nodes_ranks_are_counted_as_the_launcher_says(
    ranks, variables: dict[str, str], wanted: int
) -> None:
    assert ranks(2).run(ranks_per_node, variables) == [wanted] * 2
