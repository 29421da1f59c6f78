"""Compile every shipped kernel configuration without a GPU, and inspect the machine code.

On NVIDIA registers and stack come from `cuobjdump`, spills are the loads and stores of the stack in
`nvdisasm`'s listing, tensor-core instructions are counted in the PTX. On AMD all comes from the
kernel's metadata. Triton caches what it compiles, so a second run only inspects.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """Limits of one multiprocessor, from the CUDA programming guide's table of capabilities."""

    shared_block: int  # bytes of shared memory that one block may use
    shared: int  # bytes of shared memory
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


LIMITS = {
    "sm_80": Limits(163 << 10, 164 << 10),
    "sm_90": Limits(227 << 10, 228 << 10),
    "sm_100": Limits(227 << 10, 228 << 10),
}
_GFX942_SHARED = 64 << 10  # bytes


@dataclass(frozen=True)
class Configuration:
    """One kernel as it would be launched on one architecture."""

    name: str
    arch: str
    module: str
    function: str
    signature: dict[str, str]
    constants: dict[str, Any]
    unaligned: tuple[str, ...]  # integers that the compiler may not take for multiples of 16
    num_warps: int
    num_stages: int
    may_spill: bool = False  # it must compile and fit, but may be slow


@dataclass(frozen=True)
class Report:
    """A configuration compiled: what it needs, and what is wrong with it."""

    name: str
    arch: str
    num_warps: int
    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that move registers to or from local memory
    shared: int  # bytes a block
    tensor_cores: str  # kinds of tensor-core instructions, and their numbers
    occupancy: float  # resident warps as a share of a multiprocessor's maximum, 0 to 1
    seconds: float
    problem: str = ""
    may_spill: bool = False


OPS = ("mixers", "diagonal_scan", "convolution", "norm", "rotary", "cross_entropy", "experts")


def configurations(arch: str) -> Iterator[Configuration]:
    """All configurations shipped for an architecture, each distinct one once."""
    mixers = importlib.import_module("kernels.triton.mixers")
    seen: set[str] = set()
    for op in OPS:
        for name, launch in importlib.import_module(f"kernels.triton.{op}").shipped(arch):
            yield from _unseen(_from_launch(name, arch, launch), seen)
    for name, launch in mixers.spilling(arch):
        yield from _unseen(replace(_from_launch(name, arch, launch), may_spill=True), seen)


def _unseen(configuration: Configuration, seen: set[str]) -> Iterator[Configuration]:
    """The configuration, unless an earlier one differs in nothing but its name."""
    key = repr(replace(configuration, name="", may_spill=False))
    if key not in seen:
        seen.add(key)
        yield configuration


def _from_launch(name: str, arch: str, launch: Any) -> Configuration:
    """The configuration that the JIT would compile for a launch."""
    names = launch.kernel.arg_names
    given = {**dict(zip(names, launch.args, strict=False)), **launch.constants}
    num_warps, num_stages = given.pop("num_warps"), given.pop("num_stages")
    signature, constants, unaligned = {}, {}, []
    generic = {names[p.num] for p in launch.kernel.params if p.do_not_specialize}
    for key in names:
        value = given[key]
        if value is None or key in launch.constants or (isinstance(value, int) and value == 1):
            signature[key] = "constexpr"
            constants[key] = value
        elif isinstance(value, int):
            signature[key] = "i32"
            if value % 16 or key in generic:
                unaligned.append(key)
        elif isinstance(value, float):
            signature[key] = "fp32"
        else:
            signature[key] = "*" + _TYPES[str(value.dtype)]
    return Configuration(
        name, arch, launch.kernel.__module__, launch.kernel.__name__, signature, constants,
        tuple(unaligned), num_warps, num_stages,
    )  # fmt: skip


_TYPES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
    "torch.int64": "i64",
    "torch.int32": "i32",
}


def compile_one(configuration: Configuration) -> Report:
    """Compile and inspect one configuration."""
    import time

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    c = configuration
    function = getattr(importlib.import_module(c.module), c.function)
    attrs = {}
    for position, (key, kind) in enumerate(c.signature.items()):
        if kind.startswith("*") or (kind == "i32" and key not in c.unaligned):
            attrs[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, c.signature, c.constants, attrs)
    nvidia = c.arch.startswith("sm_")
    target = (
        GPUTarget("cuda", int(c.arch.removeprefix("sm_")), 32)
        if nvidia
        else GPUTarget("hip", c.arch, 64)
    )
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    began = time.perf_counter()
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever the compiler raises is this row's report
        problem = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        return Report(c.name, c.arch, c.num_warps, 0, 0, 0, 0, "", 0.0, 0.0, problem, c.may_spill)
    seconds = time.perf_counter() - began
    inspect = _inspect_nvidia if nvidia else _inspect_amd
    registers, stack, spills, tensor_cores = inspect(compiled)
    shared = compiled.metadata.shared
    occupancy = _occupancy(c.arch, registers, shared, c.num_warps) if nvidia else 0.0
    limit = LIMITS[c.arch].shared_block if nvidia else _GFX942_SHARED
    problem = f"needs {shared} bytes of shared memory, of {limit}" if shared > limit else ""
    return Report(
        c.name, c.arch, c.num_warps, registers, stack, spills, shared, tensor_cores,
        occupancy, seconds, problem, c.may_spill,
    )  # fmt: skip


def _inspect_nvidia(compiled: Any) -> tuple[int, int, int, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert used is not None, usage
        # Registers are spilled to the stack: without a stack there are none, and the listing, which
        # takes a third of the time of compiling, is not needed.
        listing = _output(tools / "nvdisasm", "-c", file.name) if int(used[2]) else ""
    instruction = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"
    kinds = Counter(re.findall(instruction, compiled.asm["ptx"]))
    tensor_cores = " ".join(f"{kind}×{count}" for kind, count in kinds.items())
    spills = len(re.findall(r"\b(?:STL|LDL)\b", listing))
    return int(used[1]), int(used[2]), spills, tensor_cores


def _inspect_amd(compiled: Any) -> tuple[int, int, int, str]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    matrix = len(re.findall(r"\bv_mfma_\w+", text))
    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    stack = field("private_segment_fixed_size")
    return field("vgpr_count"), stack, spills, f"mfma×{matrix}" if matrix else ""


def _output(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout


def _occupancy(arch: str, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps as a share of the maximum. A warp gets registers in units of 256."""
    limits = LIMITS[arch]
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // a_warp // num_warps if a_warp else limits.blocks
    by_shared = limits.shared // (shared + 1024)  # the system takes 1 KB a block
    blocks = min(by_registers, by_shared, limits.blocks, limits.warps // num_warps)
    return blocks * num_warps / limits.warps


def compile_all(configurations: Iterable[Configuration], jobs: int) -> Iterator[Report]:
    """Reports in the order of the configurations, from `jobs` processes.

    They are forked, before there is a thread: a fresh Python imports torch for two seconds.
    """
    wanted = list(configurations)
    if min(jobs, len(wanted)) <= 1:
        yield from map(compile_one, wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        yield from pool.map(compile_one, wanted)


def failed(report: Report) -> bool:
    """Whether a configuration does not compile, does not fit, or spills though it may not; on
    architectures with `LIMITS` only."""
    gated = report.arch in LIMITS
    return gated and bool(report.problem or (report.spills and not report.may_spill))


def main(archs: list[str], pattern: str, as_json: bool, jobs: int | None) -> int:
    """Run the command; exit code 1 if any configuration has `failed`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile needs the real compiler: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    wanted = [c for arch in archs for c in configurations(arch) if pattern in c.name]
    if not wanted:
        print(f"--only is {pattern[:200]!r}; no kernel's name contains it", file=sys.stderr)
        return 2
    reports = []
    if not as_json:
        print(_HEADER)
    for report in compile_all(wanted, jobs or os.cpu_count() or 1):
        reports.append(report)
        if not as_json:
            print(_row(report), flush=True)
    bad = [report for report in reports if failed(report)]
    slow = sum(r.spills > 0 for r in reports) - sum(r.spills > 0 for r in bad)
    if as_json:
        print(json.dumps([asdict(r) | {"failed": failed(r)} for r in reports], indent=1))
    else:
        print(
            f"{len(reports)} configurations, {len(bad)} of them spill, do not fit or fail; "
            f"{slow} more may spill and do"
        )
    return 1 if bad else 0


_HEADER = (
    f"{'kernel':58} {'arch':7} {'warps':>5} {'regs':>5} {'stack':>6} {'spills':>6} "
    f"{'shared':>7} {'occup.':>6} {'s':>5}  tensor cores"
)


def _row(r: Report) -> str:
    return (
        f"{r.name:58} {r.arch:7} {r.num_warps:5} {r.registers:5} {r.stack:6} {r.spills:6} "
        f"{r.shared:7} {r.occupancy:6.0%} {r.seconds:5.1f}  {r.tensor_cores} {r.problem}"
    )
