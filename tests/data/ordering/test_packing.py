"""Every way of packing keeps every token, fills every batch, and cuts little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.ordering.packing import Packer, gaps, loads

METHODS = ("balanced", "best_fit", "sequential")


def filled(lengths: list[int], batches: int, size: int) -> np.ndarray:
    """`lengths`, repeated and cut to sum to batches * size."""
    total = batches * size
    many = np.tile(np.array(lengths), -(-total // sum(lengths)))
    ends = np.cumsum(many)
    many = many[: int(np.searchsorted(ends, total)) + 1]
    many[-1] -= int(many.sum()) - total
    return many


def check(rows: np.ndarray, lengths: np.ndarray, batches: int, size: int, seq_len: int) -> None:
    assert (np.bincount(rows[:, 0], rows[:, 2], batches) == size).all()
    assert (np.bincount(rows[:, 1], rows[:, 2], len(lengths)) == lengths).all()
    assert rows[:, 2].min() >= 1
    assert rows[:, 2].max() <= seq_len
    assert (np.lexsort((rows[:, 1], rows[:, 0])) == np.arange(len(rows))).all()


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    batches=st.integers(1, 12),
    size=st.integers(20, 500),
    divisor=st.integers(1, 10),
    key=st.integers(0, 2**63),
)
def test_batches_are_full_and_documents_whole(
    method: str, lengths: list[int], batches: int, size: int, divisor: int, key: int
) -> None:
    seq_len = max(2, size // divisor)
    many = filled(lengths, batches, size)
    packer = Packer.fitted(method, size, seq_len, many)
    rows = packer.pack(many, key)
    check(rows, many, batches, size, seq_len)
    assert (packer.pack(many, key) == rows).all()


def code_lengths(count: int) -> list[int]:
    """Lengths like those of source files: log-normal, with a long tail."""
    drawn = np.random.default_rng(0).lognormal(7.4, 1.4, count)
    return np.clip(drawn, 8, 200_000).astype(int).tolist()


@pytest.mark.parametrize(
    ("size", "seq_len"),
    [
        (8192, 2048),
        (8192, 4096),
        (16384, 2048),
        (32768, 4096),
        (65536, 8192),
        (131072, 32768),
    ],
)
def test_load_is_five_times_steadier_than_laying_end_to_end(size: int, seq_len: int) -> None:
    batches = (1 << 21) // size
    many = filled(code_lengths(4000), batches, size)
    spread = {}
    for method in METHODS:
        rows = Packer.fitted(method, size, seq_len, many).pack(many, 0)
        check(rows, many, batches, size, seq_len)
        load = np.array(
            [(rows[rows[:, 0] == b, 2].astype(float) ** 2).sum() for b in range(batches)]
        )
        assert loads(rows, batches) == pytest.approx(load)
        spread[method] = load.std()
        extra = len(rows) - int((-(-many // seq_len)).sum())
        assert extra < batches  # fewer cuts than the batches' edges alone would make
    assert spread["balanced"] * 5 < spread["sequential"]


def test_best_fit_cuts_nothing_that_fits() -> None:
    many = np.array([60, 50, 40, 30, 20])
    rows = Packer("best_fit", 100, 100).pack(many, 0)
    assert len(rows) == len(many)
    assert gaps(many, 2, 100, 100) == 0
    # 70 + 70 + 60 do not fit in two batches of 100: two go in whole, 60 fills both.
    assert gaps(np.array([70, 70, 60]), 2, 100, 100) == 60
    assert len(Packer("best_fit", 100, 100).pack(np.array([70, 70, 60]), 0)) == 4


def test_sequential_is_what_its_name_says() -> None:
    rows = Packer("sequential", 10, 4).pack(np.array([7, 1, 12]), 0)
    assert rows.tolist() == [
        [0, 0, 4],
        [0, 0, 3],
        [0, 1, 1],
        [0, 2, 2],
        [1, 2, 2],
        [1, 2, 4],
        [1, 2, 4],
    ]


def test_a_million_short_documents_pack_in_seconds() -> None:
    lengths = np.random.default_rng(1).integers(10, 200, 200_000)
    size = int(lengths.sum()) // 16
    lengths[-1] += 16 * size - lengths.sum() if lengths.sum() < 16 * size else 0
    many = filled(lengths.tolist(), 16, size)
    rows = Packer("balanced", size, 2048).pack(many, 0)
    check(rows, many, 16, size, 2048)
    load = loads(rows, 16)
    assert load.std() < 1e-3 * load.mean()
