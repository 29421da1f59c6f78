"""`bench` times every mixer in both layouts, on the ranks that it is given."""

from __future__ import annotations

import json
from unittest import mock

import pytest

from parallel import World, bench
from parallel.__main__ import main

SETTINGS = bench.Settings(tokens=6, heads=2, head_dim=4, only="", rounds=1, as_json=True)


def rows(world: World) -> list[dict]:
    """The rows of all mixers, and whether a sequence was cut in each layout."""
    cut: list[bool] = []
    shard = bench._shard

    def noted(lengths: list[int], world: World) -> bench.Shard:
        made = shard(lengths, world)
        cut.append(made.view is not None and made.view.crossing)
        return made

    with mock.patch.object(bench, "_shard", noted):
        found = [json.loads(bench._json(row)) for row in bench.measure(world, SETTINGS)]
    assert cut == [False, True]
    return found


def test_every_mixer_is_timed_with_whole_and_with_cut_sequences(ranks) -> None:
    first, second = ranks(2).run(rows)
    assert first == second
    timed = {(row["mixer"], row["part"]) for row in first}
    assert timed == {(name, part) for name in bench.NAMES for part in ("recurrence", "layer")}
    for row in first:
        assert row["ranks"] == 2
        assert min(row["whole_mean"], row["cut_mean"]) > 0
        assert row["ratio"] == row["cut"] / row["whole"]
        assert bench._line(bench.Row(**{name: row[name] for name in bench.Row._fields}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ranks 0", "--ranks is 0; it must be at least 1"),
        ("--ranks 2 --ranks -4", "--ranks is -4; it must be at least 1"),
        ("--tokens 0", "--tokens is 0; it must be at least 1"),
        (f"--tokens {'9' * 30}", "it must be at most 1073741824"),
        ("--head-dim 0", "--head-dim is 0; it must be at least 1"),
        ("--rounds 0", "--rounds is 0; it must be at least 1"),
        ("--only gpt", "--only is 'gpt'; no mixer of linear, retention, mamba2"),
    ],
)
def test_wrong_options_end_with_one_line(
    options: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["parallel", "bench", *options.split()])
    assert main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
