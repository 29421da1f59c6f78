"""Processes for tests, forked from one that has imported what all of them need.

A fresh Python takes five seconds of a core to import torch, DeepSpeed and TensorBoard, and to
compile what these compile when they are imported; a fork takes none. Commands that a test is
about as they stand in a shell (the README's, Slurm's, torchrun's) are started from nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[1]


def context() -> mp.context.ForkServerContext:
    """Where processes are forked; the first call of a session starts what they are forked from."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    # Modules are found in this folder. Triton decides when it is imported whether it interprets:
    # programs shall compile.
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        forkserver.ensure_running()
    return found


class Program:
    """A Python program that runs, as `subprocess.Popen` would have it.

    Args:
        words: a module after "-m", or a script, and its arguments.
        environment: all of it.
        errors: the file that takes its standard error; if none, that goes to `stdout` too.

    Attributes:
        stdout: what it writes to standard output, line by line.
        returncode: None while it runs; −N where signal N ended it.
    """

    def __init__(
        self,
        words: Sequence[object],
        environment: Mapping[str, str],
        errors: Path | None = None,
    ) -> None:
        ours, theirs = mp.Pipe(duplex=False)
        arguments = ([str(word) for word in words], dict(environment), theirs, errors)
        self._process: ForkServerProcess = context().Process(target=_run, args=arguments)
        self._process.start()
        theirs.close()
        self.stdout: IO[str] = open(os.dup(ours.fileno()), encoding="utf-8")  # noqa: SIM115
        ours.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it has still written when it has ended."""
        said = [""]
        if not self.stdout.closed:
            reader = threading.Thread(target=lambda: said.append(self.stdout.read()), daemon=True)
            reader.start()
            reader.join(timeout)
        self.wait(timeout)
        self.stdout.close()
        return said[-1], None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(
    words: list[str], environment: dict[str, str], output: Connection, errors: Path | None
) -> None:
    """In the fork: be the program, as Python would have begun it."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    if errors is not None:
        with errors.open("wb") as file:
            os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    line_by_line = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdout = open(1, "w", buffering=1 if line_by_line else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", buffering=1, closefd=False, errors="backslashreplace"
    )
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
