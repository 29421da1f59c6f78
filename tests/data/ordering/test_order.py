"""The order is a permutation every epoch, and spreads lengths evenly."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.ordering.order import mixed, ranks


@settings(deadline=None)
@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_has_every_document_once(count: int, key: int, epoch: int) -> None:
    start = epoch * count
    found = ranks(np.arange(start, start + count), count, key)
    assert sorted(found.tolist()) == list(range(count))


@settings(deadline=None)
@given(count=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_any_position_can_be_asked_by_itself(count: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, 2**44), min_size=1, max_size=20)))
    together = ranks(positions, count, key)
    assert ((together >= 0) & (together < count)).all()
    alone = [int(ranks(np.array([p]), count, key)[0]) for p in positions]
    assert together.tolist() == alone


def test_epochs_and_keys_differ() -> None:
    count = 1000
    orders = [
        ranks(np.arange(e * count, (e + 1) * count), count, k) for e in (0, 1) for k in (3, 4)
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02


def test_the_order_is_fixed_for_all_time() -> None:
    # A cursor in a checkpoint means nothing if these change. Computed once, by hand of the
    # definition in `order`'s docstring with Python integers.
    assert ranks(np.arange(12), 12, 5).tolist() == by_definition(12, 5, 0)
    assert ranks(np.arange(100, 200), 100, 7).tolist() == by_definition(100, 7, 1)


def by_definition(count: int, key: int, epoch: int) -> list[int]:
    """The order in plain Python, position by position."""
    word = 2**64 - 1
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    def permute(value: int, size: int, salt: int) -> int:
        half = 1
        while 4**half < size:
            half += 1
        mask = 2**half - 1
        while True:
            left, right = value >> half, value & mask
            for turn in range(4):
                extra = (turn * 0xD1B54A32D192ED03) & word
                left, right = right, left ^ (mix((right + salt + extra) & word) & mask)
            value = (left << half) | right
            if value < size:
                return value

    strata = 1
    while strata < 64 and count >= 16 * strata:
        strata *= 2
    edges = [i * count // strata for i in range(strata + 1)]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    rows = count // strata
    longer = [i for i, size in enumerate(sizes) if size > rows]
    epoch_key = mix(key ^ mix(epoch + 1))
    found = []
    for place in range(count):
        row, column = divmod(place, strata)
        row_key = mix(epoch_key ^ mix((row + golden) & word))
        if row < rows:
            stratum = permute(column, strata, row_key)
        else:
            stratum = longer[permute(column, len(longer), row_key)]
        stratum_key = mix((epoch_key + mix((stratum * golden) & word)) & word)
        found.append(edges[stratum] + permute(row, sizes[stratum], stratum_key))
    return found


def test_each_run_of_64_takes_one_of_every_64th_of_the_lengths() -> None:
    count = 64 * 37
    found = ranks(np.arange(count), count, 9).reshape(37, 64)
    assert (np.sort(found // 37, axis=1) == np.arange(64)).all()
    # … in an order of its own each time.
    assert len({tuple(row) for row in (found // 37).tolist()}) == 37


def test_every_place_has_a_seed_of_its_own_in_64_bits() -> None:
    seeds = (0, 1, 5_000_000_000, 20_261_130, (1 << 63) - 1)
    places = list(itertools.product(seeds, range(300), (0, 1, 2, 1 << 20, 1 << 40)))
    found = {mixed(*place) for place in places}
    assert len(found) == len(places)
    assert min(found) >= 0
    assert 1 << 63 < max(found) < 1 << 64
