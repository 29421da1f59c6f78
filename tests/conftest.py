"""What every room's tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest

# Two threads on two cores: tests that run ranks would fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# The files that take longest, longest first: what begins last should be short.
LONGEST = (
    "tests/slurm/",
    "tests/kernels/tools/",
    "tests/test_readme.py",
    "tests/kernels/triton/",
    "tests/parallel/simulation/",
    "tests/train/",
    "tests/parallel/",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run when they are asked for: `pytest -m slow`."""
    items.sort(key=lambda item: [not item.nodeid.startswith(name) for name in LONGEST])
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="made by pytest -m slow"))


def pytest_collection_finish() -> None:
    """What is imported stays until the end: nobody need look through it for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], object]]:
    """A world of the given size; each size is started once a file.

    No longer: gloo wakes every hundredth of a second on each rank that waits, and the ranks of
    three workers that wait for their next file take a sixth of two cores.
    """
    from tests.ranks import Ranks

    worlds: dict[int, Ranks] = {}

    def world(size: int) -> Ranks:
        if size not in worlds:
            worlds[size] = Ranks(size)
        return worlds[size]

    yield world
    for started in worlds.values():
        started.close()
