"""If a rank dies or stops, the others end with an error that names it and the step."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from datetime import timedelta

import pytest

from tests.ranks import launch

RANKS, LAST, STEP, WAIT_S = 4, 2, 3, 4


def train_until_one_is_gone(kind: str) -> None:
    """What each process runs: steps of attention over all ranks, until rank LAST is gone."""
    import numpy as np
    import torch

    import parallel
    from parallel import ParallelConfig, distribute, join

    count = np.arange(64)
    with join(layers=timedelta(seconds=WAIT_S)) as world:
        for step in range(1, 100):
            parallel.at_step(step)
            if (world.rank, step) == (LAST, STEP):
                os.kill(os.getpid(), getattr(signal, kind))
            cu_seqlens = np.array([0, 64])
            _, _, shard = distribute(count, count, cu_seqlens, world, ParallelConfig("ring"))
            q = torch.randn(1, shard.tokens, 2, 8, requires_grad=True)
            parallel.softmax_attention(q, q, q, shard).sum().backward()


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
def test_survivors_end_and_name_the_rank_and_the_step(kind: str) -> None:
    """Within the timeout of a layer and the time to ask each other, some seconds."""
    processes = launch(RANKS, __file__, kind)
    try:
        ends = []
        for rank, process in enumerate(processes):
            if rank != LAST:
                said, _ = process.communicate(timeout=200)
                ends.append(time.monotonic())
                assert process.returncode == 1, said
                last = said.strip().splitlines()[-1]
                # On a loaded machine a broken connection may be noticed later than silence.
                # And one who waited for another survivor knows from that one that it is missing.
                how = "(has not answered for |is gone or does not answer)"
                how = f"(is gone|{how})" if kind == "SIGKILL" else how
                assert re.search(f"LostRankError: rank {LAST} {how}", last)
                assert f" in step {STEP}; so says rank {rank}" in last
        assert ends[-1] - ends[0] < WAIT_S + 15
    finally:
        for process in processes:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    train_until_one_is_gone(sys.argv[1])
