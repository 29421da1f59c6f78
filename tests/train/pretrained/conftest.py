"""What the tests of imports begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.pretrained.shapes import SHAPES, export, make


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of two layers as transformers has it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    export(make(SHAPES["llama"], 620), folder)
    return folder
