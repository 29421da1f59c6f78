"""A cluster for the tests, with a home that has a space in its name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    # Not under pytest's own folders: their paths are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        started = Cluster(Path(folder))
        try:
            yield started
        finally:
            started.close()
