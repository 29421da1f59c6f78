"""Packing: which sequences lie in which batch of a window.

A window is a run of batches that is planned as a whole from a run of documents with
exactly that many tokens. `Item` rows are what is dealt out: (document, tokens).
"""

from __future__ import annotations

import numpy as np


def sequential(lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int) -> np.ndarray:
    """Lay documents end to end and cut at every batch edge and every seq_len tokens.

    Args:
        lengths: int64 (documents,), summing to batches * batch_tokens.

    Returns:
        int64 (sequences, 3): rows of batch, document, length; each document's pieces are
        in order.
    """
    ends = np.cumsum(lengths)
    edges = np.arange(1, batches + 1, dtype=np.int64) * batch_tokens
    inner = [
        np.arange(end - length + seq_len, end, seq_len)
        for end, length in zip(ends, lengths, strict=True)
        if length > seq_len
    ]
    cuts = np.unique(np.concatenate([ends, edges, *inner]))
    starts = np.concatenate([[0], cuts[:-1]])
    return np.stack(
        [starts // batch_tokens, np.searchsorted(ends, starts, side="right"), cuts - starts],
        axis=1,
    )
