"""Clusters say where their numbers are from, and a file that is wrong is refused in one line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels import flops
from parallel.planning import clusters
from parallel.planning.clusters import RECURRENCES, SOURCES, Cluster, Recurrent, Work, load_cluster
from parallel.planning.costs import Costs

HERE = Path(clusters.__file__).parent


@pytest.mark.parametrize("name", clusters.clusters())
def test_every_number_of_a_shipped_cluster_says_where_it_is_from(name: str) -> None:
    cluster = load_cluster(name)
    wanted = {each.name for each in fields(Cluster)} - {"sources"}
    given = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    assert wanted == set(given) - {"sources"}  # none is left to a default
    assert wanted <= set(cluster.sources)
    assert all(said.startswith(SOURCES) for said in cluster.sources.values())


@pytest.mark.parametrize(
    ("name", "kind", "heads", "milliseconds", "tokens"),
    [
        ("h200", "gated_deltanet", 32, 15.761, 32768),  # flash-linear-attention#645
        ("h200", "kda", 32, 45.179, 32768),
        ("h800", "gated_deltanet", 64, 15.560, 32768),  # flash-linear-attention#691
    ],
)
def test_published_times_of_mixers_are_priced(
    name: str, kind: str, heads: int, milliseconds: float, tokens: int
) -> None:
    """To the three digits that the files give, forward and backward together."""
    found = load_cluster(name).seconds(Recurrent(kind, heads, 128, 128))
    both = 1e3 * tokens * (found.forward + found.backward)
    assert both == pytest.approx(milliseconds, rel=5e-3)


def test_a_mixer_of_other_shape_takes_as_long_as_its_work() -> None:
    cluster = load_cluster("h200")
    told = cluster.recurrence["gla"]
    found = cluster.seconds(Recurrent("gla", 6, 64, 256))
    work = [flops.linear_attention([1], *shape, False) for shape in ((6, 64, 256), (1, 128, 128))]
    for each in fields(told):
        wanted = 1e-9 * getattr(told, each.name) * work[0] / work[1]
        assert getattr(found, each.name) == pytest.approx(wanted)


def test_work_beside_attention_is_priced_part_by_part() -> None:
    """Each part alone: its forward and its backward pass by hand."""
    h800 = load_cluster("h800")
    mixer = h800.seconds(Recurrent("kda", 2, 128, 128))
    assert h800.rest(Work(989e12 * 0.62)) == pytest.approx((1, 2))
    assert h800.rest(Work(0, windows=989e12 * 0.5)) == pytest.approx((1, 2.5))
    assert h800.rest(Work(0, touched=3350e9)) == pytest.approx((1, 2))
    both = h800.rest(Work(0, (Recurrent("kda", 2, 128, 128),) * 3))
    assert both == pytest.approx((3 * mixer.forward, 3 * mixer.backward))


def described(**changes: Any) -> dict[str, Any]:
    content = yaml.safe_load((HERE / "h800.yaml").read_text(encoding="utf-8"))
    return {**content, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recurrence": None}, "recurrence must be a mapping with one entry each for linear"),
        ({"recurrence": {}}, "recurrence must be a mapping with one entry each for linear"),
        ({"recurrence": [1]}, "recurrence must be a mapping"),
        ({"recurrence": dict.fromkeys(RECURRENCES, 3)}, "recurrence.linear: it must be a mapping"),
        (
            {"recurrence": {kind: {"forward": 1} for kind in RECURRENCES}},
            "backward, middle, gradient must be given",
        ),
        ({"sources": {"tflops": "guessed"}}, "begins with one of measured, published, scaled"),
        ({"sources": [1]}, "sources must say"),
        ({"sources": {3: "measured"}}, "sources must say"),
        ({"attention_tile": 0}, "attention_tile is '0'; it must be a whole number above 0"),
        ({"launch_us": float("nan")}, "launch_us is 'nan'"),
        ({"half": 3}, "unknown half"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(described(**changes)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        load_cluster(str(file))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_need_not_say_where_its_numbers_are_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    content = described(tflops=500)
    del content["sources"]
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert load_cluster(str(file)).tflops == 500


@pytest.mark.parametrize("tile", [1, 128])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 128), (0, 129), (77, 300), (128, 500)])
def test_attention_is_priced_by_the_tiles_that_hold_a_pair(tile: int, start: int, end: int) -> None:
    """Counted tile by tile: rows from the run's first on, keys from the sequence's first on."""
    costs = Costs(pair=1.0, tile=tile)
    wanted = 0
    for first in range(start, end, tile):
        last = min(first + tile, end) - 1  # the last query sees most keys
        wanted += tile * tile * (last // tile + 1)
    found = costs.attention(*(clusters.np.array([x]) for x in (start, end)))
    assert found.tolist() == [wanted]
