"""The stream: every token on exactly one rank, cut between sequences."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel import World, cut, distribute, shard

CPU = torch.device("cpu")


def test_a_cut_is_the_boundary_nearest_to_the_even_one() -> None:
    assert cut(np.array([0, 64, 65, 135, 164]), 2) == [(0, 2), (2, 4)]
    assert cut(np.array([0, 164]), 3) == [(0, 0), (0, 1), (1, 1)]
    assert cut(np.array([0, 40, 80, 120, 164]), 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 9))
def test_every_token_is_on_one_rank_and_every_sequence_whole(
    lengths: list[int], ranks: int
) -> None:
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    stream = np.arange(cu_seqlens[-1])
    tokens, held = [], []
    for rank in range(ranks):
        mine, labels, part = distribute(stream, stream, cu_seqlens, World(rank, ranks, 0, CPU))
        if (labels == -100).all():
            assert part.lengths == (1,)  # a rank with no sequence holds one unlabelled token
            continue
        tokens += mine.tolist()
        held += part.lengths
        assert part.tokens == len(mine)
        assert abs(len(mine) - cu_seqlens[-1] / ranks) <= 2 * max(lengths)
    assert tokens == stream.tolist()
    assert held == lengths


def test_positions_begin_anew_in_every_sequence() -> None:
    part = shard([3, 1, 2], CPU)
    assert part.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert part.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert shard([2], CPU, start=5).positions.tolist() == [5, 6]
