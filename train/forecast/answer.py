"""`python -m train plan`: where a run would be, what it needs there, and how that is shown."""

from __future__ import annotations

import json

from data.settings import ConfigError
from parallel.planning.clusters import load_cluster
from parallel.simulation import pictures
from train import memory, planning
from train.config import Config
from train.engine import dtype_of
from train.forecast import asked, report
from train.forecast.activations import Device
from train.forecast.case import Case

_MOST_RANKS = 4096
_CLUSTER = "h200"


def answer(
    config: Config,
    cluster: str | None,
    ranks: int | None,
    on_cpu: bool,
    as_json: bool,
    figure: str | None,
) -> int:
    """Run the command: forecast, print, and draw if `figure` is a path.

    Args:
        cluster: its name, or the path of its YAML file; None for `parallel.cluster`, or an H200's.
        ranks: how many, or None for what the job script asks for.
        on_cpu: whether the ranks are of this machine's CPU.

    Raises:
        ConfigError: the settings, the cluster or the number of ranks are wrong.
    """
    try:
        if figure is not None:
            pictures.check(figure)
        named = cluster or config.parallel.cluster
        described = load_cluster(named or _CLUSTER)
    except ValueError as error:
        key = "--cluster" if cluster else "parallel.cluster"
        raise ConfigError(str(error).replace("cluster is", f"{key} is", 1)) from None
    nodes, gpus = asked.nodes_and_gpus()
    each = gpus or described.ranks_per_node
    asked_nodes = None if ranks or on_cpu else nodes
    ranks = ranks if ranks is not None else 1 if on_cpu else nodes * each
    most = min(_MOST_RANKS, config.train.batch_tokens)
    if not 1 <= ranks <= most:
        raise ConfigError(
            f"--gpus is {ranks}; it must be from 1 to {most:,}"
            + (", the tokens of a batch" if most < _MOST_RANKS else "")
        )
    planning.check(config.parallel, ranks)
    device: Device = "cpu" if on_cpu else "cuda"
    each = ranks if on_cpu else min(ranks, each)
    room = memory.memory() / ranks if on_cpu else described.memory_gb * 1e9
    # The shipped prices are GPUs'.
    priced = named if on_cpu else named or _CLUSTER
    case = Case(config, ranks, each, room, device, dtype_of(config.train, device), priced)
    made = report.report(case, asked_nodes, described if priced else None)
    print(json.dumps(made, indent=1) if as_json else report.text(made))
    if figure is not None:
        try:
            report.figure(made).savefig(figure, dpi=120)
        except OSError as error:
            raise ConfigError(f"--figure is {figure}: {error.strerror}") from None
    return 0
