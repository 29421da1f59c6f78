"""A machine is measured, and plans are made by what was measured."""

from __future__ import annotations

from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from parallel import FullAttention, ParallelConfig, Planner, World
from parallel.__main__ import main
from parallel.measure import _links
from parallel.planning.clusters import RECURRENCES, Cluster, load_cluster
from parallel.planning.layout import Topology


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the command wrote here, in next to no time."""
    path = tmp_path_factory.mktemp("measured") / "mine.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["parallel", "measure", "--seconds", "0.01", "--out", str(path)])
        assert main() == 0
    return path


def test_a_measured_file_is_whole_and_says_what_was_measured(file: Path) -> None:
    cluster = load_cluster(str(file))
    names = {each.name for each in fields(Cluster)} - {"sources"}
    assert set(cluster.sources) == names == set(yaml.safe_load(file.read_text())) - {"sources"}
    by_rank = {"ranks_per_node", "inside_gb", "nics", "nic_gbit", "network"}
    by_rank |= {"latency_inside_us", "latency_between_us"}
    for name in names:
        wanted = "assumed" if name in by_rank else "measured"
        assert cluster.sources[name].startswith(wanted), name
    assert set(cluster.recurrence) == set(RECURRENCES)


def test_plans_are_made_by_a_measured_file(file: Path) -> None:
    cluster = load_cluster(str(file))
    model = FullAttention(heads=4, kv_heads=2, head_dim=16)
    with closing(Planner(ParallelConfig(cluster=str(file)), Topology(4, 2), model)) as planner:
        assert planner.costs == model.costs(cluster)
        assert planner.costs.pair == pytest.approx(
            4 * 4 * 16 / (cluster.tflops * 1e12 * cluster.attention)
        )
        assert planner.plan(np.array([900, 80, 20])).stream.tokens.sum() == 1000


def links(world: World) -> dict[str, Any]:
    return _links(replace(world, ranks_per_node=2), 0.0, lambda _: None)


def test_links_are_measured_over_the_ranks_of_a_node_and_over_nodes(ranks) -> None:
    wanted = {"latency_inside_us", "inside_gb", "latency_between_us", "nics", "nic_gbit", "network"}
    found = ranks(4).run(links)
    assert all(set(each) == wanted for each in found)
    assert all(value > 0 for value in found[0].values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seconds 0", "--seconds is 0.0; it must be 0.01 to 3600"),
        ("--seconds nan", "--seconds is nan; it must be 0.01 to 3600"),
        ("--out nowhere/x.yaml", "there is no folder 'nowhere'"),
        ("--out /", "there is no folder"),
        ("--out {taken}", "which exists; name a new file"),
    ],
)
def test_wrong_options_end_with_one_line_before_any_work(
    options: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken = tmp_path / "taken.yaml"
    taken.write_text("mine")
    monkeypatch.setattr("parallel.measure.measure", None)  # not called
    command = ["parallel", "measure", *options.format(taken=taken).split()]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert taken.read_text() == "mine"


def test_training_refuses_a_wrong_cluster_in_one_line(tmp_path: Path) -> None:
    from data.settings import ConfigError
    from train.planning import check

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("tflops: fast")
    check(ParallelConfig(), 1)
    check(ParallelConfig(cluster="h200"), 1)
    for cluster, said in (("h3", "must be one of a800"), (str(wrong), "must be given")):
        with pytest.raises(ConfigError, match=r"parallel\.cluster: ") as caught:
            check(ParallelConfig(cluster=cluster), 1)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
