"""A few random configurations; `python -m tests.fuzz_configs` makes thousands."""

from __future__ import annotations

from tests.fuzz_configs import Fault, cases, place


def test_random_configurations_train_or_are_refused_in_one_line() -> None:
    ends = []
    for count, seed, train in ((6, 1, True), (60, 2, False)):
        with place(train) as here:
            ends += [here.judge(words) for _, words in cases(count, seed)]
    faults = [f"{end.kind}: {end.overrides}\n{end.what}" for end in ends if isinstance(end, Fault)]
    assert not faults, faults[0]
    assert {"trained", "refused", "read"} <= {end for end in ends if isinstance(end, str)}
