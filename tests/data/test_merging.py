"""Which settings merge and which replace, from base to file to command line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from data.__main__ import Settings
from data.settings import ConfigError, dump, load

SOURCES: list[Any] = ["stdlib", {"path": "a.txt"}, {"hub": "x/y", "weight": 2}, ["b.txt", "c.txt"]]


def source(folder: Path, text: str, *overrides: str, base: str = "") -> Any:
    (folder / "base.yaml").write_text(base)
    (folder / "run.yaml").write_text(f"base: base.yaml\n{text}")
    return load(Settings, folder / "run.yaml", overrides).data.source


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SOURCES, SOURCES)))
def test_a_source_is_replaced_whatever_form_it_had(tmp_path: Path, before: Any, after: Any) -> None:
    first, second = (f"data: {{source: {dump(one)}, workers: 1}}" for one in (before, after))
    assert source(tmp_path, first, f"data.source={dump(after)}") == after
    assert source(tmp_path, first, f"data={{source: {dump(after)}}}") == after
    assert source(tmp_path, second, base=first) == after
    one, other = (f"data.source={dump(given)}" for given in (before, after))
    assert source(tmp_path, "", one, other) == after


def test_a_part_of_a_source_is_set_by_its_own_key(tmp_path: Path) -> None:
    given = "data: {source: {path: a.txt, weight: 1}}"
    assert source(tmp_path, given, "data.source.weight=3") == {"path": "a.txt", "weight": 3}
    assert source(tmp_path, "", "data.source.path=a.txt") == {"path": "a.txt"}
    assert source(tmp_path, given, "data.source.weight=3", "data.source=stdlib") == "stdlib"
    found = source(tmp_path, given, "data.source={hub: x}", "data.source.weight=3")
    assert found == {"hub": "x", "weight": 3}


@pytest.mark.parametrize("given", ["stdlib", ["a.txt"]])
def test_a_part_of_what_is_no_mapping_is_one_line(tmp_path: Path, given: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"data.source is .*, no mapping; give data.source as one"
    ):
        source(tmp_path, f"data: {{source: {dump(given)}}}", "data.source.weight=3")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.stages={step: 3}", r"data.stages is \{step: 3\}; it must be a list"),
        ("data.workers={a: 1}", r"data.workers is \{a: 1\}; it must be a whole number"),
        ("train.seq_len={step: {a: 1}}", r"train.seq_len is .*; it must be a whole number"),
        ("data.source=3", r"data.source is 3; it must be text or a list"),
        ("data.source=null", r"data.source is null; it must be text or a list"),
    ],
)
def test_a_mapping_for_another_setting_is_one_line(
    tmp_path: Path, override: str, line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        source(tmp_path, "data: {source: a.txt}", override)


def test_settings_that_are_only_mappings_merge(tmp_path: Path) -> None:
    from train.config import read

    (tmp_path / "base.yaml").write_text("model: {mixers: {gla: {heads: 2}, attention: {heads: 4}}}")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nmodel: {mixers: {gla: {head_dim: 8}}}")
    words = ["model.mixers={attention: {heads: 8}}", "model.mixers.gla.heads=3"]
    assert read(tmp_path / "run.yaml", words).model.mixers == {
        "gla": {"heads": 3, "head_dim": 8},
        "attention": {"heads": 8},
    }


def test_keys_and_values_of_a_mapping_have_their_types(tmp_path: Path) -> None:
    from train.config import read

    (tmp_path / "run.yaml").write_text("parallel: {speeds: {3: 0.5, 0: 1}}")
    found = read(tmp_path / "run.yaml", ["parallel.speeds.3=0.75", "parallel.speeds={1: 5e-1}"])
    assert found.parallel.speeds == {3: 0.75, 0: 1.0, 1: 0.5}
    assert {type(x) for pair in found.parallel.speeds.items() for x in pair} == {int, float}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("{x: 0.5}", "parallel.speeds: a key is x; it must be a whole number"),
        ("{1.5: 0.5}", "parallel.speeds"),
        ("{1: fast}", r"parallel.speeds\[1\] is fast; it must be a number"),
        ("{1: .nan}", r"parallel.speeds\[1\] is '.nan'; it must be a number"),
        ("{1: [0.5]}", r"parallel.speeds\[1\] is \[0.5\]; it must be a number"),
    ],
)
def test_a_wrong_key_or_value_of_a_mapping_is_one_line(
    tmp_path: Path, override: str, line: str
) -> None:
    from train.config import read

    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match=line) as raised:
        read(tmp_path / "run.yaml", [f"parallel.speeds={override}"])
    assert "\n" not in str(raised.value)
