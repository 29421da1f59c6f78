"""What it costs a linear layer that a sequence is cut: `python -m parallel bench`.

The same tokens lie over the ranks in two layouts: a whole sequence a rank, where nothing is
exchanged, and one sequence over all ranks, whose states pass from rank to rank. Both are timed in
one process group, in turns, forward + backward:

    recurrence   the op alone, from q, k, v, decay and β to its outputs
    layer        with projections to q, k, v and a gate, which is computed while states travel,
                 and back, of a model as wide as all heads

On CPUs the time of a rank is that of its process on all cores, so that waiting costs nothing and
ranks that share a core do not slow each other down; on GPUs it is the time between two events.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.tools.check import MIXERS, mixer_inputs
from parallel.config import ParallelConfig
from parallel.layers import Meanwhile, diagonal_scan, linear_attention
from parallel.stream import distribute
from parallel.travel.view import Shard
from parallel.world import World, join

SCAN = "diagonal scan"
NAMES = (*MIXERS, SCAN)


class Settings(NamedTuple):
    """Sizes of what is timed.

    Attributes:
        tokens: of a rank.
        only: mixers whose names contain this.
        rounds: runs of either layout; the quickest counts, since noise only adds to a time.
    """

    tokens: int
    heads: int
    head_dim: int
    only: str
    rounds: int
    as_json: bool


class Row(NamedTuple):
    """Times of one mixer's recurrence or layer on `ranks` ranks, in ms a rank.

    Attributes:
        whole, cut: the largest over ranks, of whole sequences and of one sequence over all ranks.
        whole_mean, cut_mean: the mean over ranks.
    """

    mixer: str
    part: str
    ranks: int
    tokens: int
    whole: float
    whole_mean: float
    cut: float
    cut_mean: float

    @property
    def ratio(self) -> float:
        return self.cut / self.whole

    @property
    def ratio_mean(self) -> float:
        return self.cut_mean / self.whole_mean


Run = Callable[[Shard], None]  # forward and backward of what is timed


def runs(name: str, settings: Settings, device: torch.device) -> dict[str, Run]:
    """The recurrence and the layer of a mixer, on random inputs for a shard of `tokens` tokens."""
    T, H, D = settings.tokens, settings.heads, settings.head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = H * D

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    if name == SCAN:
        given = {"x": random(1, T, width), "decay": F.logsigmoid(random(1, T, width).float() + 2)}
        projected = ["x"]
    else:
        exact = mixer_inputs(name, 1, T, H, D)
        given = {
            key: x.to(device, torch.float32 if key in ("decay", "beta") else dtype)
            for key, x in exact.items()
        }
        projected = ["q", "k", "v"]
    leaves = [x.requires_grad_() for x in given.values()]
    do = random(1, T, width)

    def op(x: dict[str, Tensor], shard: Shard, meanwhile: Meanwhile | None = None) -> Tensor:
        if name == SCAN:
            return diagonal_scan(x["x"], x["decay"], shard, meanwhile=meanwhile)[0]
        optional = (x.get("decay"), x.get("beta"))
        o, _ = linear_attention(x["q"], x["k"], x["v"], *optional, shard, meanwhile=meanwhile)
        return o.flatten(2)  # (1, t, H, D) -> (1, t, H · D)

    def recurrence(shard: Shard) -> None:
        torch.autograd.grad(op(given, shard), leaves, do)

    hidden = random(1, T, width).requires_grad_()
    weights = [(width**-0.5 * random(width, width)).requires_grad_() for _ in (*projected, 0, 0)]

    def layer(shard: Shard) -> None:
        *to_inputs, to_gate, back = weights
        x = dict(given)
        for key, weight in zip(projected, to_inputs, strict=True):
            x[key] = (hidden @ weight).view_as(given[key])
            if key == "k":
                x[key] = F.normalize(x[key], dim=-1)
        gates: list[Tensor] = []

        def gate(piece: int, pieces: int) -> None:
            gates.append(hidden @ to_gate.tensor_split(pieces, dim=1)[piece])

        o = op(x, shard, gate)
        y = (o * F.silu(torch.cat(gates, dim=-1))) @ back
        torch.autograd.grad(y, [hidden, *weights], do)

    return {"recurrence": recurrence, "layer": layer}


def measure(world: World, settings: Settings) -> Iterator[Row]:
    """The rows of all mixers that were asked for; every rank must take part."""
    whole, cut = (_shard(lengths, world) for lengths in _layouts(world.size, settings.tokens))
    for name in NAMES:
        if settings.only not in name:
            continue
        for part, run in runs(name, settings, world.device).items():
            times: tuple[list[float], list[float]] = ([], [])
            for counted in range(-1, settings.rounds):  # the first round warms up
                for shard, found in zip((whole, cut), times, strict=True):
                    world.barrier()
                    spent = _milliseconds(run, shard, world.device)
                    if counted >= 0:
                        found.append(spent)
            least = np.array(world.gather([min(found) for found in times]))
            (a, b), (mean_a, mean_b) = least.max(0).tolist(), least.mean(0).tolist()
            yield Row(name, part, world.size, settings.tokens, a, mean_a, b, mean_b)


def _layouts(ranks: int, tokens: int) -> tuple[list[int], list[int]]:
    """Lengths of a whole sequence a rank, and of one sequence over all ranks."""
    return [tokens] * ranks, [tokens * ranks]


def _shard(lengths: list[int], world: World) -> Shard:
    """This rank's part of the sequences laid end to end."""
    count = np.arange(sum(lengths))
    bounds = np.append(0, np.cumsum(lengths))
    # Full attention by gathered keys leaves the stream in the batch's order.
    return distribute(count, count, bounds, world, ParallelConfig("allgather"))[2]


def _milliseconds(run: Run, shard: Shard, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(shard)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    began = time.process_time()
    run(shard)
    return 1e3 * (time.process_time() - began)


def main(ranks: list[int], settings: Settings) -> int:
    """Run the command; the exit code. Under torchrun or srun its ranks are those of the job."""
    if not any(settings.only in name for name in NAMES):
        raise ValueError(f"--only is {settings.only!r}; no mixer of {', '.join(NAMES)} contains it")
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        _on_rank(settings, True)
        return 0
    for i, size in enumerate(ranks):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        arguments = (size, port, settings, i == 0)
        torch.multiprocessing.spawn(_started, args=arguments, nprocs=size)
    return 0


def _started(rank: int, size: int, port: int, settings: Settings, heading: bool) -> None:
    """A rank in a process of its own: one core's work, on the CPU."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    _on_rank(settings, heading)


def _on_rank(settings: Settings, heading: bool) -> None:
    torch.manual_seed(0)
    with join() as world:
        if world.is_first and heading and not settings.as_json:
            print(_HEADER, flush=True)
        for row in measure(world, settings):
            if world.is_first:
                print(_json(row) if settings.as_json else _line(row), flush=True)
    sys.stdout.flush()


_HEADER = (
    f"{'mixer':31} {'part':10} {'ranks':>5} {'tokens':>6}   {'whole ms':>8} {'mean':>8}   "
    f"{'cut ms':>8} {'mean':>8}   {'ratio':>5} {'mean':>5}"
)


def _line(row: Row) -> str:
    return (
        f"{row.mixer:31} {row.part:10} {row.ranks:5} {row.tokens:6}   {row.whole:8.1f} "
        f"{row.whole_mean:8.1f}   {row.cut:8.1f} {row.cut_mean:8.1f}   {row.ratio:5.2f} "
        f"{row.ratio_mean:5.2f}"
    )


def _json(row: Row) -> str:
    fields: dict[str, Any] = row._asdict()
    return json.dumps(fields | {"ratio": row.ratio, "ratio_mean": row.ratio_mean})
