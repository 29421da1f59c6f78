"""What ranks do together before any layer: who they are, sums, and what one does for all."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from parallel import World, join
from parallel.world import _nodes, _tasks

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


@pytest.mark.parametrize(("node", "wanted"), [(0, 7), (1, 8), (3, 8), (4, 2)])
def test_slurm_says_how_many_ranks_each_node_has(node: int, wanted: int) -> None:
    assert _tasks("7,8(x3),2", node) == wanted


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [((1, 2), (2, (1, 2))), ((2, 1), (2, ())), ((1, 1, 1), (1, ()))],
)
def test_ranks_agree_on_a_node_that_misses_one(
    sizes: tuple[int, ...], wanted: tuple[int, tuple[int, ...]], ranks
) -> None:
    """Each knows its own node only; the last node may have fewer without being named."""
    assert ranks(sum(sizes)).run(_of_my_node, sizes) == [wanted] * sum(sizes)


def _of_my_node(world: World, sizes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return _nodes([size for size in sizes for _ in range(size)][world.rank], world.size)
