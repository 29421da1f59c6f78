"""Times of every op and of other installed implementations, over the length of the sequence.

Forward, and forward + backward, on one device: on a GPU in bf16 if there is one, else on the CPU in
fp32. The bytes are those that the op must move at least: its inputs and its output, three times for
forward + backward; the peak is the most that forward + backward allocates at a time, gradients
included. The roofline is the longer of the times for these bytes and for the FLOPs of
`kernels.flops`, the latter three times too.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import flops
from kernels.tools.check import MIXERS, mixer_inputs

# Memory bytes a second and dense bf16 FLOPs a second, from the data sheets.
ROOFLINES = {
    "A100": (2.0e12, 312e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
}


class Subject(NamedTuple):
    """One op at one length, by one implementation."""

    op: str
    by: str
    run: Callable[[], Tensor]
    leaves: list[Tensor]
    work: float  # FLOPs of the forward pass


class Timing(NamedTuple):
    op: str
    by: str
    tokens: int
    forward_ms: float
    both_ms: float  # forward + backward
    megabytes: float
    peak_mb: float
    roofline: float | None  # share of the roofline that forward + backward reaches


def subjects(T: int, device: str) -> Iterator[Subject]:
    """For each op, our implementation and every other one that is installed, at T tokens."""
    on_gpu = device == "cuda"
    B, H, D = (1, 32, 128) if on_gpu else (1, 4, 64)
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    for mixer, (_, delta) in MIXERS.items():
        inputs = {
            name: t.to(device, torch.float32 if name in ("decay", "beta") else dtype)
            for name, t in mixer_inputs(mixer, B, T, H, D).items()
        }
        leaves = [t.requires_grad_() for t in inputs.values()]
        work = flops.linear_attention([T] * B, H, D, D, delta)
        for by, run in {"headrace": _ours, **_recurrence_peers(mixer, on_gpu)}.items():
            yield Subject(mixer, by, partial(run, inputs), leaves, work)

    wide = H * D
    x, weight, gate = random(B, T, wide), random(wide, 4), random(B, T, wide)
    yield Subject(
        "short_convolution", "headrace",
        lambda: kernels.short_convolution(x, weight)[0], [x, weight], 0.0,
    )  # fmt: skip
    yield Subject(
        "short_convolution", "torch conv1d",
        lambda: F.silu(F.conv1d(x.mT, weight[:, None], padding=3, groups=wide)[..., :T]).mT,
        [x, weight], 0.0,
    )  # fmt: skip
    decay = F.logsigmoid(torch.randn(B, T, wide, device=device) + 2).requires_grad_()
    yield Subject(
        "diagonal_scan", "headrace", lambda: kernels.diagonal_scan(x, decay)[0], [x, decay], 0.0
    )
    scale = random(wide)
    yield Subject(
        "rms_norm, gated", "headrace",
        lambda: kernels.rms_norm(x, scale, gate=gate), [x, scale, gate], 0.0,
    )  # fmt: skip
    yield Subject(
        "rms_norm, gated", "torch",
        lambda: F.rms_norm(x, (wide,), scale, 1e-6) * F.silu(gate), [x, scale, gate], 0.0,
    )  # fmt: skip
    q, k, v = (random(B, T, H, D) for _ in range(3))
    positions = torch.arange(T, device=device)
    yield Subject(
        "rotary_embedding", "headrace",
        lambda: kernels.rotary_embedding(q, positions), [q], 0.0,
    )  # fmt: skip
    vocabulary = 65536 if on_gpu else 1024
    hidden, head = random(T, 4 * D), random(vocabulary, 4 * D)
    labels = torch.randint(vocabulary, (T,), device=device)
    work = 2.0 * T * 4 * D * vocabulary
    yield Subject(
        "linear_cross_entropy", "headrace",
        lambda: kernels.linear_cross_entropy(hidden, head, labels)[0], [hidden, head], work,
    )  # fmt: skip
    yield Subject(
        "linear_cross_entropy", "torch",
        lambda: F.cross_entropy((hidden @ head.T).float(), labels, reduction="sum"),
        [hidden, head], work,
    )  # fmt: skip
    yield from _experts(T, device, dtype)
    work = flops.softmax_attention([T] * B, H, D, D)
    yield Subject("softmax_attention", "headrace", lambda: _attention(q, k, v), [q, k, v], work)
    yield Subject(
        "softmax_attention", "torch SDPA",
        lambda: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ).transpose(1, 2),
        [q, k, v], work,
    )  # fmt: skip
    if on_gpu and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        yield Subject(
            "softmax_attention", "flash-attn",
            lambda: flash_attn_func(q, k, v, causal=True), [q, k, v], work,
        )  # fmt: skip


def _experts(T: int, device: str, dtype: torch.dtype) -> Iterator[Subject]:
    """Experts as wide as Qwen3-Next's on a GPU, a quarter as wide and fewer on a CPU."""
    E, K, D, inner = (512, 10, 2048, 512) if device == "cuda" else (64, 8, 512, 128)
    kind: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
    x, weights = torch.randn(T, D, **kind), torch.rand(T, K, **kind)
    up = torch.randn(E, 2 * inner, D, **kind)
    out = torch.randn(E, D, inner, **kind)
    choice = torch.rand(T, E, device=device).topk(K, dim=1).indices
    leaves, work = [x, weights, up, out], 6.0 * T * K * D * inner

    def ours() -> Tensor:
        by_expert, order = choice.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(E, device=device), right=True)
        return kernels.expert_mlp(x, order // K, weights.flatten()[order], ends, up, out)

    yield Subject("expert_mlp", "headrace", ours, leaves, work)
    if importlib.util.find_spec("transformers"):
        from transformers.models.qwen3_next.modeling_qwen3_next import (
            Qwen3NextConfig,
            Qwen3NextExperts,
        )

        sizes: dict[str, Any] = {"hidden_size": D, "moe_intermediate_size": inner, "num_experts": E}
        for by in ("eager", "grouped_mm"):
            config = Qwen3NextConfig(**sizes)
            config._experts_implementation = by
            with torch.device("meta"):
                theirs = Qwen3NextExperts(config)
            given = {"gate_up_proj": up, "down_proj": out}
            call = partial(torch.func.functional_call, theirs, given, (x, choice, weights))
            yield Subject("expert_mlp", f"transformers {by}", call, leaves, work)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = kernels.softmax_attention(q, k, v)
    assert isinstance(o, Tensor)
    return o


def _ours(x: dict[str, Any]) -> Tensor:
    return kernels.linear_attention(**x)[0]


def _recurrence_peers(mixer: str, on_gpu: bool) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """Other installed implementations of a mixer, by name."""
    peers: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {}
    if mixer == "gated deltanet" and importlib.util.find_spec("transformers"):
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        peers["transformers"] = lambda x: torch_chunk_gated_delta_rule(
            x["q"], x["k"], x["v"], g=x["decay"], beta=x["beta"]
        )[0]
    if not on_gpu or not importlib.util.find_spec("fla"):
        return peers
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def fla(op: Callable[..., Any], decay: str | None = None) -> None:
        def run(x: dict[str, Tensor]) -> Tensor:
            given: dict[str, Any] = {name: x[name] for name in ("q", "k", "v", "beta") if name in x}
            if decay:
                given[decay] = x["decay"]
            result: Tensor = op(**given)[0]
            return result

        peers["flash-linear-attention"] = run

    match mixer:
        case "linear":
            fla(lambda **x: chunk_linear_attn(**x, normalize=False))
        case "retention":
            fla(chunk_simple_gla, "g_gamma")
        case "mamba2":
            fla(chunk_simple_gla, "g")
        case "gla":
            fla(chunk_gla, "g")
        case "deltanet":
            fla(chunk_delta_rule)
        case "gated deltanet":
            fla(chunk_gated_delta_rule, "g")
        case "kda":
            fla(chunk_kda, "g")
    return peers


def measure(subject: Subject, tokens: int, device: str) -> Timing:
    """Median times of a subject. A first run, which compiles and warms up, is not counted."""

    def forward() -> Tensor:
        with torch.no_grad():
            return subject.run()

    y = forward()
    cotangent = torch.randn_like(y)

    def both() -> None:
        torch.autograd.grad(subject.run(), subject.leaves, cotangent)

    forward_s, both_s = _seconds(forward, device), _seconds(both, device)
    moved = sum(t.numel() * t.element_size() for t in subject.leaves)
    moved += y.numel() * y.element_size()
    share = None
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for gpu, (bandwidth, peak) in ROOFLINES.items():
            if gpu in name:
                share = 3 * max(moved / bandwidth, subject.work / peak) / both_s
    return Timing(
        subject.op, subject.by, tokens, 1e3 * forward_s, 1e3 * both_s, 3 * moved / 1e6,
        _peak(both, device) / 1e6, share,
    )  # fmt: skip


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median seconds of many runs. On a GPU the device's own time, with its cache emptied between
    runs."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(run, warmup=20, rep=200, return_mode="median"))

    def once() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    first = once()
    return statistics.median(once() for _ in range(max(2, min(20, int(0.2 / max(first, 1e-6))))))


def _peak(run: Callable[[], object], device: str) -> float:
    """Most bytes that a run holds at a time, above what is held before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return float(most)


def plot(timings: list[Timing], path: str) -> None:
    """Save an image of forward + backward times over the length, one panel for each op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = list(dict.fromkeys(t.op for t in timings))
    rows = -(-len(ops) // 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(16, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(ops) :]:
        axis.axis("off")
    for axis, op in zip(axes.flat, ops, strict=False):
        mine = [t for t in timings if t.op == op]
        for by in dict.fromkeys(t.by for t in mine):
            curve = [t for t in mine if t.by == by]
            axis.plot([t.tokens for t in curve], [t.both_ms for t in curve], "o-", label=by)
        axis.set(title=op, xscale="log", yscale="log", xlabel="tokens", ylabel="ms, fwd + bwd")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(lengths: list[int], only: str, path: str, as_json: bool) -> int:
    """Run the command; the exit code."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = sorted(lengths or ([8192, 16384, 32768] if device == "cuda" else [256, 512, 1024]))
    timings: list[Timing] = []
    if not any(only in subject.op for subject in subjects(1, device)):
        print(f"--only is {only[:200]!r}; no op's name contains it", file=sys.stderr)
        return 2
    if not as_json:
        print(
            f"{'op':32} {'by':24} {'tokens':>7} {'fwd ms':>9} {'both ms':>9} {'× ours':>7} "
            f"{'MB':>8} {'peak MB':>8} {'roofline':>8}"
        )
    for T in lengths:
        ours = 0.0
        for subject in subjects(T, device):
            if only not in subject.op:
                continue
            timing = measure(subject, T, device)
            timings.append(timing)
            if subject.by == "headrace":
                ours = timing.both_ms
            if not as_json:
                share = "" if timing.roofline is None else f"{timing.roofline:.0%}"
                print(
                    f"{timing.op:32} {timing.by:24} {T:7} {timing.forward_ms:9.2f} "
                    f"{timing.both_ms:9.2f} {timing.both_ms / ours:7.2f} "
                    f"{timing.megabytes:8.1f} {timing.peak_mb:8.1f} {share:>8}",
                    flush=True,
                )
    if as_json:
        print(json.dumps([t._asdict() for t in timings], indent=1))
    plot(timings, path)
    print(f"plot saved in {path}", file=sys.stderr)
    return 0
