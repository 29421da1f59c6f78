"""Where there is no GPU, every Triton kernel runs in the interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton, which reads it then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

    from tests.kernels import interpreter

    interpreter.hasten()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
