#!/usr/bin/env bash
#
# Triton 3.9.0 with TRITON_INTERPRET=1: a kernel that calls a @triton.jit function of one line runs
# several times slower than the same kernel with that line written out.
#
# Guess beforehand: a call costs what a Python call costs, so the two take about as long.
# Seen: each call of a jitted function searches all of triton.language for what the interpreter
# replaces (_patch_lang), although the launch around it has replaced it already. In our kernels,
# which are built of such functions, that was 44 % of the time of their tests (cProfile,
# 31,510 calls in 42 launches). Source: triton/runtime/interpreter.py, InterpretedFunction.__call__.
#
# Installs into a temporary folder and fails if the slow-down is gone (below 1.5 times).

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "triton==3.9.0" "numpy==2.4.6"

cat >"$folder/nested.py" <<'PYTHON'
import time

import torch
import triton
import triton.language as tl


@triton.jit
def plus_one(x):
    return x + 1.0


@triton.jit
def nested(out, N: tl.constexpr):
    at = tl.program_id(0) * 16 + tl.arange(0, 16)
    x = tl.zeros((16,), tl.float32)
    for _ in range(N):
        x = plus_one(x)
    tl.store(out + at, x)


@triton.jit
def written_out(out, N: tl.constexpr):
    at = tl.program_id(0) * 16 + tl.arange(0, 16)
    x = tl.zeros((16,), tl.float32)
    for _ in range(N):
        x = x + 1.0
    tl.store(out + at, x)


def seconds(kernel):
    out = torch.empty(64)
    kernel[(4,)](out, N=2)  # the source is read once
    began = time.process_time()
    kernel[(4,)](out, N=100)
    assert (out == 100).all()
    return time.process_time() - began


inline, called = (min(seconds(kernel) for _ in range(3)) for kernel in (written_out, nested))
print(f"triton {triton.__version__}: written out {inline:.3f} s, called {called:.3f} s, "
      f"{called / inline:.1f} times as long")
assert called > 1.5 * inline, "the slow-down is gone"
PYTHON
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/nested.py"
