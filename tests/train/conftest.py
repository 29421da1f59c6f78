"""A run for the tests of `train`, and one world of one for all that a process makes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.train.runs import STEPS


@pytest.fixture(scope="session")
def world() -> Iterator[None]:
    """DeepSpeed keeps the first world it sees for as long as the process lives."""
    from parallel import join

    with join():
        yield


@pytest.fixture(scope="module")
def torch_code() -> Iterator[None]:
    """transformers would run flash-linear-attention's kernels, which want a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla", None)
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, world: None) -> Path:
    """A tiny model on a few of the checkout's own sources; the corpus is prepared once."""
    folder = tmp_path_factory.mktemp("run")
    return tiny.write(
        folder / "tiny.yaml",
        f"""
train: {{steps: {STEPS}, batch_tokens: 512, seq_len: 192, accumulate: 2}}
eval: {{every: 4, tokens: 2048, sample_tokens: 5}}
checkpoint: {{every: 2, keep: 0}}
""",
    )


@pytest.fixture(scope="session")
def undisturbed(config: Path) -> Path:
    """The folder of a run that nothing happened to."""
    from train.__main__ import main

    root = config.parent / "undisturbed"
    assert main([str(config), f"run.root={root}"]) == 0
    return root / "tiny"
