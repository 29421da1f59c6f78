"""The stream: every token on exactly one rank, in shards of one size."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import ParallelConfig, Shard, World, distribute, shard

CPU = torch.device("cpu")


def shards(
    lengths: list[int], ranks: int, config: ParallelConfig | None = None
) -> list[tuple[np.ndarray, np.ndarray, Shard]]:
    """Each rank's (tokens, labels, shard) of a stream that counts from 0, with labels alike."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    count = np.arange(cu_seqlens[-1])
    parts = [
        distribute(count, count, cu_seqlens, World(rank, ranks, 0, CPU), config)
        for rank in range(ranks)
    ]
    return [(tokens.numpy(), labels.numpy(), part) for tokens, labels, part in parts]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 9))
def test_every_token_is_on_one_rank_and_ranks_hold_equally_many(
    lengths: list[int], ranks: int
) -> None:
    held = shards(lengths, ranks)
    labelled = np.concatenate([tokens[labels >= 0] for tokens, labels, _ in held])
    assert sorted(labelled) == list(range(sum(lengths)))
    sizes = [len(tokens) for tokens, _, _ in held]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 9))
def test_fragments_end_to_end_are_the_sequences(lengths: list[int], ranks: int) -> None:
    begins = np.cumsum(lengths) - lengths
    for tokens, labels, part in shards(lengths, ranks):
        assert part.tokens == len(tokens)
        assert part.cu_seqlens.tolist() == [0, *np.cumsum(part.lengths)]
        assert min(part.lengths) >= 1
        sequence = np.searchsorted(begins, tokens, side="right") - 1
        positions = part.positions.numpy()
        real = labels >= 0
        np.testing.assert_array_equal(positions[real], (tokens - begins[sequence])[real])
        begins_here = [positions[start] == 0 for start in part.cu_seqlens[:-1].tolist()]
        assert begins_here == sorted(begins_here)


def test_fewer_tokens_than_ranks_leave_no_rank_empty() -> None:
    held = shards([1, 0, 2], 5)
    assert [len(tokens) for tokens, _, _ in held] == [1] * 5
    assert sorted(labels.tolist() for _, labels, _ in held) == [[-100], [-100], [0], [1], [2]]
    assert [part.lengths for _, _, part in held] == [(1,)] * 5


def test_a_rank_knows_which_fragments_it_holds_of_a_sequence() -> None:
    in_order = ParallelConfig(attention="allgather")
    # Cuts at 4, 8, 12: the second rank holds only the middle of the long sequence.
    views = [part.view for _, _, part in shards([2, 11, 3], 4, in_order)]
    assert [view.continued for view in views] == [0, 1, 1, 1]
    assert [view.first for view in views] == [1, 0, 0, 0]
    chains = [view.chains(2, 1).forward for view in views]
    assert [[chain.rows for chain in each] for each in chains] == [
        [{0: slice(2, 4)}],
        [{1: slice(0, 4)}],
        [{2: slice(0, 4)}],
        [{3: slice(0, 1)}],
    ]


def test_positions_begin_anew_in_every_sequence() -> None:
    part = shard([3, 1, 2], CPU)
    assert part.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert part.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert shard([2], CPU, start=5).positions.tolist() == [5, 6]
