"""Shares of decks: whole tokens in every window, and exact over any number of windows."""

from __future__ import annotations

import pytest

from data.ordering.mixture import Stage


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 0, 2), (1, 1 << 39), (7,)], ids=str)
def test_what_a_window_rounds_the_next_ones_make_good(weights: tuple[int, ...]) -> None:
    """The largest deck takes what is left, less than a token of each of the others."""
    stage = Stage(0, 8, weights)
    done, taken = 0, [0] * len(weights)
    for tokens in [7, 1, 40, 1, 1, 2] * 100:
        quotas = stage.quotas(done, tokens)
        assert sum(quotas) == tokens
        done += tokens
        taken = [before + quota for before, quota in zip(taken, quotas, strict=True)]
        for tokens_of_deck, weight in zip(taken, weights, strict=True):
            assert abs(tokens_of_deck - done * weight / sum(weights)) < len(weights)
