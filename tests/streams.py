"""Streams of random tokens for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Stream(NamedTuple):
    """As a batch of the data room: labels are the next token of the same sequence, or −100."""

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray


def streams(shapes: Sequence[Sequence[int]], vocabulary: int) -> list[Stream]:
    """One for each list of sequence lengths; the same at every call."""
    random = np.random.default_rng(0)
    made = []
    for lengths in shapes:
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        tokens = random.integers(0, vocabulary, cu_seqlens[-1])
        labels = np.roll(tokens, -1)
        labels[cu_seqlens[1:] - 1] = -100
        made.append(Stream(tokens, labels, cu_seqlens))
    return made
