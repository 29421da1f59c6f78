"""Ranks for tests: processes that join one world and then run one case after the other.

Joining a world costs seconds, a case costs a fraction of one.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tests.processes import Program, context

LIMIT_S = 300


class Ranks:
    """`size` processes in one gloo world; `run` is a collective call."""

    def __init__(self, size: int) -> None:
        self.size = size
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = Pipe()
            process = context().Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`case(world, *arguments)` on every rank, a module-level function; each one's result."""
        for pipe in self._pipes:
            pipe.send((case, arguments))
        results, faults = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT_S):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {LIMIT_S} s")
            fault, result = pipe.recv()
            results.append(result)
            faults += [f"rank {rank}:\n{fault}"] if fault else []
        if faults:
            raise AssertionError("\n".join(faults))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def launch(count: int, *words: object) -> list[Program]:
    """The ranks of a program, as a launcher starts them; `words` as of `Program`."""
    rendezvous = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [
        Program(words, {**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    import torch

    from parallel import join

    torch.set_num_threads(1)
    with join() as world:
        while True:
            case, arguments = pipe.recv()
            try:
                pipe.send((None, case(world, *arguments)))
            except BaseException:
                pipe.send((traceback.format_exc(), None))
