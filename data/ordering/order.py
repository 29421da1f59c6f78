"""The order of documents: a keyed permutation, never a list.

Position p of epoch e holds the document of length rank `ranks(p)`, where ranks number a
deck's documents from the shortest to the longest. The order is stratified: ranks are cut
into 64 equal strata of similar lengths, and each run of 64 positions takes one document
of every stratum, in a new order each time. So every stretch of the stream has nearly the
corpus's own mixture of lengths, which is what lets the packer even out Σ len². Which
documents meet, and when, is as random as in a plain shuffle.

Each permutation is a Feistel network over the next power of four, walked along its cycle
until it lands inside (Black and Rogaway, 2002): O(1) memory, any position at once.
"""

from __future__ import annotations

import numpy as np

STRATA = 64
_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def ranks(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Length ranks at `positions` of an endless order over `count` documents.

    Args:
        positions: int64, from 0; position // count is the epoch.
        count: documents of the deck, at least 1.
        key: any 64-bit integer: the seed and the corpus.

    Returns:
        int64 of the shape of `positions`, each in [0, count); any aligned run of
        `count` positions is a permutation.
    """
    epoch, place = np.divmod(positions.astype(np.uint64), np.uint64(count))
    epoch_key = mix(np.uint64(key & (2**64 - 1)) ^ mix(epoch + np.uint64(1)))
    strata = _strata(count)
    edges = np.arange(strata + 1, dtype=np.uint64) * np.uint64(count) // np.uint64(strata)
    sizes = np.diff(edges)
    rows = np.uint64(count // strata)
    # The last row is short: only the strata that got one document more are in it.
    longer = np.flatnonzero(sizes > rows).astype(np.uint64)
    row, column = np.divmod(place, np.uint64(strata))
    width = np.where(row < rows, np.uint64(strata), np.uint64(max(1, len(longer))))
    row_key = mix(epoch_key ^ mix(row + _GOLDEN))
    stratum = _permute(column, width, row_key)
    if len(longer):
        last = row == rows
        stratum[last] = longer[stratum[last].astype(np.int64)]
    at = stratum.astype(np.int64)
    stratum_key = mix(epoch_key + mix(stratum * _GOLDEN))
    return (edges[at] + _permute(row, sizes[at], stratum_key)).astype(np.int64)


def _strata(count: int) -> int:
    """Strata for `count` documents: a power of two, each with at least 8 documents."""
    strata = 1
    while strata < STRATA and count >= 16 * strata:
        strata *= 2
    return strata


def _permute(values: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Keyed permutation of [0, size) at `values`, element by element; all uint64."""
    # frexp, unlike log2, is exact on every machine: half is the least with 4 ** half >= size.
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    out = _feistel(values, half, key)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], half[outside], key[outside])
        outside = outside[out[outside] >= size[outside]]
    return out


def _feistel(values: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for turn in range(_ROUNDS):
        salt = np.uint64((turn * 0xD1B54A32D192ED03) & (2**64 - 1))
        left, right = right, left ^ (mix(right + key + salt) & mask)
    return (left << half) | right


def mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the input reaches every bit of the output."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mixed(seed: int, *place: int) -> int:
    """64 bits of these numbers, each 0 or more and of any size: the seed of a place of its own."""
    return int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0])
