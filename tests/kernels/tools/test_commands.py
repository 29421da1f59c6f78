"""`python -m kernels …` as a user runs it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.processes import Program


@pytest.fixture
def run(tmp_path):
    def command(*arguments, timeout=240, **environment):
        # The compiler is wanted, not the interpreter that the other tests of this room run in.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
        errors = tmp_path / "errors"
        program = Program(["-m", "kernels", *arguments], environment, errors)
        said, _ = program.communicate(timeout)
        return SimpleNamespace(
            returncode=program.returncode, stdout=said, stderr=errors.read_text(encoding="utf-8")
        )

    return command


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("check", "compile", "bench"))


def test_every_op_is_as_good_as_a_plain_computation(run):
    result = run("check", "--json")
    rows = json.loads(result.stdout)
    assert result.returncode == 0, [row for row in rows if row["bad"]]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert len({row["case"] for row in rows}) >= 14


def test_a_kernel_compiles_and_is_inspected_without_a_gpu(run):
    result = run("compile", "--arch", "sm_90", "--only", "gla D128 bfloat16 forward", "--json")
    reports = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert len(reports) == 2  # with outputs, and with states
    for report in reports:
        assert 0 < report["registers"] <= 255
        assert report["spills"] == 0
        assert 0 < report["shared"] <= 227 << 10
        assert "wgmma" in report["tensor_cores"]


def test_a_second_run_compiles_nothing(run, tmp_path):
    arguments = ("compile", "--arch", "sm_90", "--only", "linear D128 bfloat16 pair", "--json")
    kept = []
    for _ in range(2):
        assert run(*arguments, TRITON_CACHE_DIR=str(tmp_path)).returncode == 0
        kept.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert len(kept[0]) == 1
    assert kept[0] == kept[1]


def test_a_name_that_no_kernel_has_is_one_line(run):
    result = run("compile", "--only", "nosuch")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "--only is 'nosuch'; no kernel's name contains it" in result.stderr


def test_spills_are_counted(run):
    # Wider than any model's heads: a state of 256 rows leaves too few registers, but for the pass
    # that makes states again, without outputs.
    result = run("compile", "--arch", "sm_90", "--only", "kda D256 bfloat16 forward", "--json")
    reports = json.loads(result.stdout)
    assert [r["spills"] > 0 for r in reports] == [True, False, True]
    assert [r["stack"] > 0 for r in reports] == [True, False, True]
    assert [r["failed"] for r in reports] == [False, False, False]


def test_a_spill_is_an_error():
    from kernels.tools.compile import Report, failed

    good = Report("x", "sm_90", 4, 255, 0, 0, 1024, "", 0.5, 1.0)
    assert not failed(good)
    assert failed(replace(good, spills=3))
    assert failed(replace(good, problem="needs more shared memory"))
    assert not failed(replace(good, spills=3, may_spill=True))
    assert failed(replace(good, problem="needs more shared memory", may_spill=True))


def test_compile_says_that_the_interpreter_is_in_the_way():
    result = subprocess.run(
        [sys.executable, "-m", "kernels", "compile"],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
    assert "Traceback" not in result.stderr


def test_bench_times_ours_and_a_peer(run, tmp_path):
    plot = tmp_path / "bench.png"
    arguments = ("--length", "64", "--only", "rms_norm", "--plot", str(plot), "--json")
    timings = json.loads(run("bench", *arguments).stdout)
    assert {t["by"] for t in timings} == {"headrace", "torch"}
    assert all(t["forward_ms"] > 0 and t["both_ms"] > 0 for t in timings)
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_no_shipped_kernel_spills_in_the_dtype_of_training(run, arch):
    result = run("compile", "--arch", arch, "--only", "bfloat16", "--json", timeout=1800)
    reports = json.loads(result.stdout)
    assert not [r for r in reports if r["failed"]]
    assert result.returncode == 0
    assert len(reports) > 100


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_configuration_fits(run, arch):
    result = run("compile", "--arch", arch, "--json", timeout=3600)
    assert not [r for r in json.loads(result.stdout) if r["failed"]]
    assert result.returncode == 0
