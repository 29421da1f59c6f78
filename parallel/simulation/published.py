"""`python -m parallel published`: what papers published, beside what the simulator says of it.

Each row is a ratio of two steps, as its paper published it, and the same ratio here, in a setting
as near to the paper's as the shipped clusters, models and lengths come. Of most papers only the
figures of their abstracts could be read, so that settings are those which the abstract names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from parallel.planning.clusters import load_cluster
from parallel.planning.layout import Topology
from parallel.simulation import simulate
from parallel.simulation.case import Case, Outcome
from parallel.simulation.groups import by_time, forms, gathered, in_order, packed, shared
from parallel.simulation.models import MODELS
from parallel.simulation.strategies import even, zeppelin


class Setting(NamedTuple):
    cluster: str
    model: str
    lengths: str
    gpus: int
    tokens_per_gpu: int
    longest: int
    zero: int = 1


@dataclass(frozen=True)
class Row:
    """One published ratio.

    Attributes:
        what, source: in words.
        published: how many times as long the slower one takes.
        settings: over which the mean is taken, or with `most` the largest.
        slower, quicker: the two steps, functions of a case and of its setting.
        why: where the two differ by more than 25 %.
    """

    what: str
    source: str
    published: float
    settings: tuple[Setting, ...]
    slower: Callable[[Case, Setting], Outcome]
    quicker: Callable[[Case, Setting], Outcome]
    most: bool = False
    why: str = ""

    def simulated(self, batches: int) -> float:
        """The ratio here."""
        ratios = []
        for setting in self.settings:
            every = cases(setting, batches)
            slower, quicker = (
                sum(step(case, setting).seconds for case in every)
                for step in (self.slower, self.quicker)
            )
            ratios.append(slower / quicker)
        return float(max(ratios) if self.most else np.mean(ratios))


def cases(setting: Setting, batches: int) -> list[Case]:
    """Batches of a setting, the same at each call."""
    rng = np.random.default_rng(0)
    cluster = load_cluster(setting.cluster)
    tokens = setting.gpus * setting.tokens_per_gpu
    return [
        Case(
            simulate.sample(setting.lengths, tokens, setting.longest, rng),
            Topology(setting.gpus, cluster.ranks_per_node),
            cluster,
            MODELS[setting.model],
            zero=setting.zero,
        )
        for _ in range(batches)
    ]


def _alone(step: Callable[[Case], Outcome]) -> Callable[[Case, Setting], Outcome]:
    return lambda case, _: step(case)


def _static(case: Case, setting: Setting, allowed: tuple[str, ...]) -> Outcome:
    """A static grid whose context parallelism holds the longest sequence that may come, in the
    quickest of the forms of full attention whose names begin with one of `allowed`."""
    ranks, heads = case.topology.ranks, case.model.heads
    size = 1
    while size < ranks and setting.longest / size > case.room:
        size *= 2
    group, _ = packed(case, size)
    every = list(forms(size, case.topology, heads))
    shapes = [shape for name, shape in every if name.startswith(allowed)] or [every[0][1]]
    return min((shared(case, group, size, shape) for shape in shapes), key=lambda x: x.seconds)


def _plain(case: Case, setting: Setting) -> Outcome:
    """Equal windows in the batch's order, each gathered and cut per sequence: "Plain-4D"."""
    return in_order(case, max(1, setting.longest // setting.tokens_per_gpu))


ZEPPELIN = tuple(
    Setting(cluster, model, lengths, gpus, 4096, 65536)
    for cluster, model in (("a800", "llama-3b"), ("a800", "llama-7b"), ("h200", "llama-7b"))
    for lengths in ("arxiv", "github", "prolong64k")
    for gpus in (16, 32)
)
ABLATION = (Setting("a800", "llama-7b", "arxiv", 32, 4096, 65536),)
FLEXSP = tuple(
    Setting("a800", "llama-7b", lengths, 64, 16384, longest, 3)
    for lengths in ("github", "arxiv")
    for longest in (196608, 393216)
)
ROWS = (
    Row(
        "Zeppelin over Transformer Engine's context parallelism, mean",
        "arXiv 2509.21841, abstract",
        2.80,
        ZEPPELIN,
        _alone(even),
        _alone(zeppelin),
        why="the paper's mean is over models to 30B and settings that its abstract does not list; "
        "the single ring that it is compared with costs more here, the more ranks it has",
    ),
    Row(
        "… the most of any setting",
        "arXiv 2509.21841",
        6.6,
        (*ZEPPELIN, Setting("a800", "llama-7b", "arxiv", 64, 4096, 65536)),
        _alone(even),
        _alone(zeppelin),
        most=True,
    ),
    Row(
        "Zeppelin, all parts, ArXiv",
        "arXiv 2509.21841, ablation",
        3.64,
        ABLATION,
        _alone(even),
        _alone(zeppelin),
    ),
    Row(
        "… routing alone",
        "arXiv 2509.21841, ablation",
        1.6,
        ABLATION,
        _alone(even),
        _alone(partial(even, routed=True)),
    ),
    Row(
        "… partitioning and engine alone",
        "arXiv 2509.21841, ablation",
        3.2,
        ABLATION,
        _alone(even),
        _alone(partial(zeppelin, routed=False, remapped=False)),
        why="without routing, rings over nodes here step over one NIC of four",
    ),
    Row(
        "… both",
        "arXiv 2509.21841, ablation",
        3.51,
        ABLATION,
        _alone(even),
        _alone(partial(zeppelin, remapped=False)),
    ),
    Row(
        "FlexSP over a static degree of Ulysses, the most",
        "arXiv 2412.01523, abstract",
        1.98,
        FLEXSP,
        partial(_static, allowed=("all-to-all",)),
        _alone(partial(by_time, form="all-to-all")),
        most=True,
    ),
    Row(
        "WLB-LLM over windows in order, mean",
        "arXiv 2503.17924, abstract",
        1.23,
        tuple(Setting("h200", "llama-7b", "prolong64k", gpus, 16384, 131072) for gpus in (32, 64)),
        _plain,
        _alone(gathered),
        why="the paper's runs have pipeline stages and tensor parallelism, in which many "
        "micro-batches even out part of what shows in full in one batch here",
    ),
    Row(
        "ByteScale over a static grid of rings, the most",
        "arXiv 2502.21231, abstract",
        7.89,
        tuple(
            Setting("h800", "llama-7b", lengths, 128, 16384, 1 << 20)
            for lengths in ("github", "arxiv")
        ),
        partial(_static, allowed=("ring", "double ring")),
        _alone(partial(by_time, form="ring")),
        most=True,
        why="against rings, single or double; with all-to-alls the static grid would be far nearer",
    ),
)


def table(batches: int = 4) -> str:
    """The rows as Markdown."""
    lines = [
        "| published | by | there | here | off by |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = row.simulated(batches)
        lines.append(
            f"| {row.what} | {row.source} | {row.published:.2f} × | {found:.2f} × "
            f"| {found / row.published - 1:+.0%} |"
        )
        if row.why:
            lines.append(f"| | | | | {row.why} |")
    return "\n".join(lines)
