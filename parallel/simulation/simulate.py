"""`python -m parallel simulate`: price a training step on a described cluster, by strategy."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel.planning.clusters import load_cluster
from parallel.planning.cost import price
from parallel.planning.described import document
from parallel.planning.layout import Array, Topology
from parallel.simulation.models import load_model
from parallel.simulation.strategies import (
    Case,
    Outcome,
    headrace,
    lower_bound,
    our_plan,
    strategies,
)

LENGTHS = Path(__file__).parent / "lengths"
_LONGEST = 1 << 40  # tokens of a sequence
_MOST_SEQUENCES = 200_000  # of a batch: a planner takes minutes over more


@dataclass(frozen=True)
class Settings:
    """What to simulate: the options of the command line, by name."""

    cluster: str
    model: str
    lengths: str
    gpus: int
    tokens_per_gpu: int
    longest: int
    batches: int
    seed: int
    routing: bool = True
    zero: int = 1


def distributions() -> list[str]:
    """The names of the length distributions here."""
    return sorted(path.stem for path in LENGTHS.glob("*.yaml"))


def sample(name: str, tokens: int, longest: int, rng: np.random.Generator) -> Array:
    """Draw the lengths of one batch of exactly `tokens` tokens: int64 (N,).

    Args:
        name: a distribution here, a YAML file like those, or the folder of a prepared corpus.
        longest: longer sequences are cut to it. The last one is cut so that the sum is right.

    Raises:
        ValueError: there is no such distribution, or its file is wrong.
    """
    draw = _source(name)
    found: list[Array] = []
    missing = tokens
    while missing > 0:
        lengths = np.minimum(draw(rng, 256), min(longest, tokens))
        kept = np.searchsorted(np.cumsum(lengths), missing) + 1
        lengths = lengths[:kept]
        lengths[-1] -= max(0, int(lengths.sum()) - missing)
        found.append(lengths)
        if len(found) * 256 > _MOST_SEQUENCES:
            raise ValueError(
                f"a batch of {tokens:,} tokens has more than {_MOST_SEQUENCES:,} sequences; lower "
                "--tokens-per-gpu, or take longer ones"
            )
        missing -= int(lengths.sum())
    return np.concatenate(found)


def _source(name: str) -> Any:
    """A function (generator, count) -> lengths, int64 (count,)."""
    path = Path(name)
    if os.path.isfile(path / "offsets.bin"):  # no error for a name that is too long for one
        offsets = np.fromfile(path / "offsets.bin", dtype=np.int64)
        documents = np.diff(offsets)
        documents = documents[documents > 0]
        return lambda rng, count: rng.choice(documents, count)
    if name in distributions():
        path = LENGTHS / f"{name}.yaml"
    elif not os.path.isfile(path):
        raise ValueError(
            f"lengths is {name[:200]!r}; it must be one of {', '.join(distributions())}, or the "
            "path of a YAML file or of a prepared corpus"
        )
    content = document(path)
    try:
        edges = np.array(content["edges"], dtype=np.float64)
        shares = np.array(content["shares"], dtype=np.float64)
        usable = len(edges) == len(shares) + 1 and (np.diff(edges) > 0).all() and edges[0] >= 1
        usable = usable and np.isfinite(edges).all() and edges[-1] <= _LONGEST
        usable = usable and (shares >= 0).all() and 0 < shares.sum() < np.inf
    except (TypeError, KeyError, ValueError, IndexError, OverflowError):
        usable = False
    if not usable:
        raise ValueError(
            f"{path}: it must have rising `edges`, the first at least 1, and one `shares` fewer, "
            "at least 0 each"
        )
    share = shares / shares.sum()

    def draw(rng: np.random.Generator, count: int) -> Array:
        which = rng.choice(len(share), count, p=share)
        low, high = np.log(edges[which]), np.log(edges[which + 1])
        return np.maximum(1, np.exp(rng.uniform(low, high))).astype(np.int64)

    return draw


def cases(settings: Settings) -> list[Case]:
    """The batches to simulate."""
    cluster, model = load_cluster(settings.cluster), load_model(settings.model)
    rng = np.random.default_rng(settings.seed)
    topology = Topology(settings.gpus, min(cluster.ranks_per_node, settings.gpus))
    tokens = settings.gpus * settings.tokens_per_gpu
    return [
        Case(
            sample(settings.lengths, tokens, settings.longest, rng),
            topology,
            cluster,
            model,
            routing=settings.routing,
            zero=settings.zero,
        )
        for _ in range(settings.batches)
    ]


def summarise(batches: list[Case]) -> dict[str, Any]:
    """What the table shows and `--json` prints, means over batches."""
    free = [replace(case, cluster=case.cluster.with_free_links()) for case in batches]
    return {
        "lower_bound_ms": 1e3 * _mean_bound(batches),
        "free_links_ms": 1e3 * float(np.mean([headrace(case).seconds for case in free])),
        "strategies": by_strategy(batches),
    }


def by_strategy(batches: list[Case]) -> dict[str, dict[str, float]]:
    """The figures of every strategy, means over batches but for `memory` and `worst_ms`."""
    bound = _mean_bound(batches)
    rows = {}
    for name, strategy in strategies(batches[0].model).items():
        outcomes: list[Outcome] = [strategy(case) for case in batches]
        rows[name] = {
            "step_ms": 1e3 * float(np.mean([each.seconds for each in outcomes])),
            "balance": float(np.mean([each.balance for each in outcomes])),
            "inside_gb": 1e-9 * float(np.mean([each.inside for each in outcomes])),
            "between_gb": 1e-9 * float(np.mean([each.between for each in outcomes])),
            "memory": float(np.max([each.memory for each in outcomes])),
            "worst_ms": 1e3 * float(np.max([each.seconds for each in outcomes])),
        }
    for row in rows.values():
        row["over_bound"] = row["step_ms"] / (1e3 * bound)
        row["speedup"] = rows["even"]["step_ms"] / row["step_ms"]
    return rows


def _mean_bound(batches: list[Case]) -> float:
    return float(np.mean([lower_bound(case) for case in batches]))


def main(settings: Settings, as_json: bool, figure: str | None) -> None:
    """Run the command: simulate, print, and draw if `figure` is a path."""
    batches = cases(settings)
    summary = summarise(batches)
    if as_json:
        print(json.dumps({"settings": vars(settings), **summary}, indent=1))
    else:
        print(_table(settings, batches, summary))
    if figure is not None:
        _draw(batches[0], summary, figure)


def _table(settings: Settings, batches: list[Case], summary: dict[str, Any]) -> str:
    count = np.mean([len(case.lengths) for case in batches])
    lines = [
        f"{settings.model} on {settings.gpus} GPUs of {settings.cluster}, {settings.lengths} "
        f"lengths, {settings.tokens_per_gpu} tokens a GPU; "
        f"{len(batches)} batches of {count:.0f} sequences",
        f"{'':<16}{'step':>10}{'÷ bound':>9}{'speed':>8}{'balance':>9}"
        f"{'inside':>14}{'between':>14}{'memory':>8}",
    ]
    for name, row in summary["strategies"].items():
        lines.append(
            f"{name:<16}{row['step_ms']:>7.0f} ms{row['over_bound']:>9.2f}"
            f"{row['speedup']:>7.2f}×{row['balance']:>9.2f}{row['inside_gb']:>11.1f} GB"
            f"{row['between_gb']:>11.1f} GB{row['memory']:>7.2f}×"
        )
    bound, free = summary["lower_bound_ms"], summary["free_links_ms"]
    lines.append(f"{'on free links':<16}{free:>7.0f} ms{free / bound:>9.2f}")
    lines.append(f"{'lower bound':<16}{bound:>7.0f} ms{1:>9.2f}")
    lines.append(
        "lower bound: all work even, no byte sent. on free links: what headrace would take here "
        "if bytes took no time; the rest of the way to its step is the network's."
    )
    lines.append(
        "speed: against even. memory: activations of the fullest rank against the even share. "
        "What each is: parallel/simulation/strategies.py."
    )
    return "\n".join(lines)


def _draw(case: Case, summary: dict[str, Any], path: str) -> None:
    """Draw step times, and what each rank does in one forward pass of a full-attention block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = our_plan(case)
    layer = price(made, case.costs())
    ranks = case.topology.ranks
    linear = float(case.linear_seconds(case.share)) / 3 / case.model.layers
    tall = min(12.0, 2.5 + ranks / 12)
    pair, (bars, timeline) = plt.subplots(1, 2, figsize=(13, tall), width_ratios=[1, 2])
    rows = summary["strategies"]
    bars.barh(list(rows), [row["step_ms"] for row in rows.values()], color="#4878a8")
    bars.axvline(summary["lower_bound_ms"], color="black", linestyle="--", label="lower bound")
    bars.invert_yaxis()
    bars.set_xlabel("step, ms")
    bars.legend()
    every = np.arange(ranks)
    begin = linear + layer.exposed[0] / 2
    timeline.barh(every, np.full(ranks, 1e3 * linear), color="#c9c9c9", label="linear layers")
    timeline.barh(every, np.full(ranks, 500 * layer.exposed[0]), left=1e3 * linear, color="#d65f5f")
    busy = np.zeros(ranks)
    for work in layer.rings:
        members = work.ring.members
        far = len(np.unique(case.topology.node(members))) > 1
        timeline.barh(
            members,
            np.full(len(members), 1e3 * (work.end[0] - work.start[0])),
            left=1e3 * (begin + work.start[0]),
            color="#6acc64" if far else "#4878a8",
        )
        busy[members] = work.end[0]
    whole = layer.finish[0] - busy
    timeline.barh(every, 1e3 * whole, left=1e3 * (begin + busy), color="#eea63c")
    end = begin + layer.finish[0].max()
    timeline.barh(every, np.full(ranks, 500 * layer.exposed[0]), left=1e3 * end, color="#d65f5f")
    for colour, label in (
        ("#d65f5f", "moves between layouts"),
        ("#6acc64", "rings over nodes"),
        ("#4878a8", "rings inside a node"),
        ("#eea63c", "whole sequences"),
    ):
        timeline.barh([0], [0], color=colour, label=label)
    timeline.set_xlabel("one block with full attention, forward, ms")
    timeline.set_ylabel("rank")
    timeline.invert_yaxis()
    timeline.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    pair.tight_layout()
    pair.savefig(path, dpi=120)
    plt.close(pair)
