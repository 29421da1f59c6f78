"""`python -m parallel measure`: a cluster's file, from what this machine does.

Rank 0 measures its device: matrix products, softmax attention by length, copies, launches, and each
kind of recurrence with the passes that cut sequences add. With several ranks (under torchrun or
srun), pairs of them then measure the links inside a node and between nodes. What a machine cannot
tell (links of a single rank) is taken from a shipped cluster, and its source says so.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor

import kernels
from kernels import flops
from kernels.recurrences import LinearAttention, Packed
from parallel.planning.clusters import (
    HEAD_DIM,
    RECURRENCES,
    Cluster,
    cluster_of,
)
from parallel.planning.costs import ATTENTION_WORK, Costs
from parallel.world import World

_TILES = (1, 16, 32, 64, 128, 256)  # rows of a tile that attention may have
_SHORT = (16, 48, 96, 160, 256, 512)  # lengths by which the tile is found
_SMALL = 8  # bytes of a message that shows a latency


def measure(world: World, budget: float, base: Cluster | None = None) -> dict[str, Any] | None:
    """What a cluster's file holds, on rank 0; None on others.

    Args:
        budget: seconds, all measurements together, warming up (and compiling) left out.
        base: what is taken for what cannot be measured; by the device's name unless given.
    """
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else "a CPU"
    known = base or cluster_of(name)
    links = 4 if world.size > 1 else 0
    parts = 4 + len(RECURRENCES) + links
    found: dict[str, Any] = {}
    with _bar(parts, world.is_first) as bar:

        def told(what: str) -> None:
            bar.set_description(what)
            bar.update()

        if world.is_first:
            share = budget / parts
            for told_of, values in _device(world.device, known, share):
                told(told_of)
                for key, value in values.items():
                    if isinstance(value, dict):
                        found.setdefault(key, {}).update(value)
                    else:
                        found[key] = value
        world.barrier()
        if links:
            found |= _links(world, budget / parts, told)
    if not world.is_first:
        return None
    return _described(found, known, world, name)


def _bar(parts: int, shown: bool) -> Any:
    """A progress bar, on rank 0's terminal."""
    from tqdm import tqdm

    disable = not (shown and sys.stderr.isatty())
    return tqdm(total=parts, unit="part", disable=disable, leave=False)


def _device(
    device: torch.device, known: Cluster, share: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each measurement of one device: what it was, and the values of the file."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    side = 8192 if on_gpu else 768
    a, b = random(side, side), random(side, side)
    rate = 2.0 * side**3 / _seconds(lambda: a @ b, device, share)
    # A CPU's peak is not known: it is what products reach.
    peak = known.tflops * 1e12 if on_gpu else rate
    yield "products", {"tflops": peak / 1e12, "matmul": rate / peak}

    reached, tile = _attention(device, random, share, on_gpu)
    yield "attention", {"attention": reached / peak, "attention_tile": tile}

    x = torch.empty(1 << (30 if on_gpu else 25), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    yield "copies", {"memory_gbs": 2e-9 * len(x) / _seconds(lambda: y.copy_(x), device, share)}

    small = random(256)

    def launches() -> None:
        for _ in range(64):
            small.add_(1)

    yield "launches", {"launch_us": 1e6 * _seconds(launches, device, share) / 64}
    for kind in RECURRENCES:
        yield kind, {"recurrence": {kind: _recurrence(kind, device, dtype, share)}}


def _seconds(
    run: Callable[..., Any],
    device: torch.device,
    share: float,
    before: Callable[[], Any] | None = None,
) -> float:
    """Median seconds of a run, over as many as take `share` seconds; one at least.

    Args:
        before: what is done before each run, untimed; the run gets what it returns.
    """

    def once() -> float:
        given = () if before is None else (before(),)
        _finish(device)
        begin = time.perf_counter()
        run(*given)
        _finish(device)
        return time.perf_counter() - begin

    once()  # compiles, and warms up
    end = time.perf_counter() + share
    times = [once()]
    while time.perf_counter() < end and len(times) < 1000:
        times.append(once())
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    """Wait for a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attention(
    device: torch.device, random: Callable[..., Tensor], share: float, on_gpu: bool
) -> tuple[float, int]:
    """FLOPs a second of causal attention on a long sequence, and the tile that explains short ones.

    The tile is the one by which the times of short sequences, as many as make up the same number
    of tokens each, are nearest to the long one's speed (least squares of logarithms).
    """
    tokens, heads = (16384, 16) if on_gpu else (1024, 2)

    def both(length: int) -> float:
        q, k, v = (random(1, tokens, heads, HEAD_DIM).requires_grad_() for _ in range(3))
        bounds = [*range(0, tokens, length), tokens]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)

        def run() -> None:
            o = kernels.softmax_attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=length)
            assert isinstance(o, Tensor)
            o.backward(torch.ones_like(o))

        return _seconds(run, device, share / (len(_SHORT) + 1))

    work = float(ATTENTION_WORK.sum()) * flops.softmax_attention(
        [tokens], heads, HEAD_DIM, HEAD_DIM
    )
    long = both(tokens)
    times = {length: both(length) for length in _SHORT}

    def misfit(tile: int) -> float:
        costs = Costs(pair=1.0, tile=tile)

        def pairs(length: int) -> float:
            lengths = np.diff([*range(0, tokens, length), tokens])
            return float(costs.attention(0 * lengths, lengths).sum())

        return sum(
            float(np.log(times[length] / long * pairs(tokens) / pairs(length)) ** 2)
            for length in _SHORT
        )

    return work / long, min(_TILES, key=misfit)


def _recurrence(
    kind: str, device: torch.device, dtype: torch.dtype, share: float
) -> dict[str, float]:
    """Nanoseconds a token and head: see `clusters.Recurrence`."""
    T, H, D = (8192, 16, HEAD_DIM) if device.type == "cuda" else (512, 1, HEAD_DIM)
    decayed, delta = RECURRENCES[kind]
    shape = {"none": None, "head": (H,), "scalar": (1, T, H), "vector": (1, T, H, D)}[decayed]
    q, k, v = (torch.randn(1, T, H, D, dtype=dtype, device=device) for _ in range(3))
    k = F.normalize(k, dim=-1)
    decay = None if shape is None else F.logsigmoid(torch.randn(shape, device=device) + 2)
    beta = torch.rand(1, T, H, device=device) if delta else None
    given = (q, k, v, decay, beta)
    recurrence, segments = LinearAttention(), Packed((T,), None)
    state = torch.zeros(1, H, D, D, device=device)
    for x in given:
        if x is not None:
            x.requires_grad_()

    def op() -> Tensor:
        return kernels.linear_attention(*given)[0]

    def without_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
        return torch.no_grad()(run)

    def middle() -> Any:
        return recurrence.finish(given, segments, recurrence.begin(given, segments), state)

    _, kept = without_gradients(middle)()
    runs: dict[str, tuple[Callable[..., Any], Callable[[], Any] | None]] = {
        "forward": (without_gradients(op), None),
        "backward": (lambda o: o.backward(torch.ones_like(o)), op),
        "middle": (without_gradients(middle), None),
        "gradient": (
            without_gradients(lambda: recurrence.begin_backward(given, segments, kept, v.detach())),
            None,
        ),
    }
    part = share / len(runs)
    return {
        name: 1e9 / (T * H) * _seconds(run, device, part, before)
        for name, (run, before) in runs.items()
    }


def _links(world: World, share: float, told: Callable[[str], None]) -> dict[str, Any]:
    """Rates and latencies: inside the first node, and between each two nodes that follow."""
    each, rank = world.ranks_per_node, world.rank
    nodes = -(-world.size // each)
    large = 1 << (28 if world.device.type == "cuda" else 22)
    found: dict[str, Any] = {}
    on_node = min(each, world.size)
    if on_node > 1:
        pair = {0: 1, 1: 0}.get(rank)
        for what, size in (("latency inside", _SMALL), ("rate inside", large)):
            seconds = _exchange(world, pair, size, share)
            told(what)
            if size == large:
                found["inside_gb"] = 1e-9 * size / seconds
            else:
                found["latency_inside_us"] = 1e6 * seconds
    if nodes > 1 and world.size == nodes * each:
        one = {0: each, each: 0}.get(rank)
        every = rank + each if rank < each else rank - each if rank < 2 * each else None
        found["latency_between_us"] = 1e6 * _exchange(world, one, _SMALL, share)
        told("latency between")
        alone = large / _exchange(world, one, large, share)
        together = each * large / _exchange(world, every, large, share)
        told("rate between")
        cards = max(1, min(each, round(together / alone)))
        found |= {"nics": cards, "nic_gbit": 8e-9 * together / cards, "network": 1.0}
    return found


def _exchange(world: World, peer: int | None, size: int, share: float) -> float:
    """Seconds in which ranks and their peers send each other `size` bytes; the slowest one's."""
    sent = torch.zeros(size, dtype=torch.uint8, device=world.device)
    got = torch.empty_like(sent)

    def once() -> None:
        if peer is not None:
            operations = [dist.P2POp(dist.irecv, got, peer), dist.P2POp(dist.isend, sent, peer)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            _finish(world.device)

    def timed() -> float:
        begin = time.perf_counter()
        once()
        return time.perf_counter() - begin

    once()
    # Every rank makes as many exchanges: rank 0 says how many fit into the time.
    runs = world.gather(max(1, min(200, int(share / max(timed(), 1e-6)))))[0]
    world.barrier()
    mine = statistics.median(timed() for _ in range(runs)) if peer is not None else 0.0
    return float(max(world.gather(mine)))


def _described(found: dict[str, Any], known: Cluster, world: World, name: str) -> dict[str, Any]:
    """The file: what was measured, and the rest from the known cluster; a source for each."""
    day = datetime.date.today().isoformat()
    where = f"{name}, {world.size} ranks, torch {torch.__version__}"
    if world.size > 1:
        found["ranks_per_node"] = min(world.ranks_per_node, world.size)
    if world.device.type == "cuda":
        found["memory_gb"] = torch.cuda.get_device_properties(world.device).total_memory / 1e9
    else:
        found["memory_gb"] = psutil.virtual_memory().total / 1e9
    content: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key in Cluster.__dataclass_fields__:
        if key == "sources":
            continue
        if key in found:
            content[key] = found[key]
            sources[key] = f"measured {day} on {where}"
        else:
            content[key] = getattr(known, key)
            sources[key] = f"assumed, from another cluster's file ({known.sources.get(key, '')})"
    if world.device.type == "cuda":
        sources["tflops"] = known.sources.get("tflops", "assumed")
    return {**_rounded(content), "sources": sources}


def _rounded(content: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return float(f"{content:.4g}") if isinstance(content, float) else content


def write(content: dict[str, Any], path: Path) -> None:
    """Write a cluster's file that does not exist yet.

    Raises:
        ValueError: it exists, or cannot be written.
    """
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"--out is {str(path)!r}, which exists; name a new file") from None
    except OSError as error:
        raise ValueError(f"--out is {str(path)!r}: {error.strerror}") from None


def check_out(path: str) -> Path:
    """Before minutes of measuring: whether a file of that name can be made."""
    out = Path(path)
    if out.name in ("", ".", "..") or not out.parent.is_dir():
        raise ValueError(f"--out is {path[:200]!r}; there is no folder {str(out.parent)[:200]!r}")
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out is {path[:200]!r}, which exists; name a new file")
    return out
