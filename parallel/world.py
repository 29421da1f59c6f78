"""The ranks of a run: one flat world, whether torchrun, srun or a plain command started it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.peers import join_store, waiting_for
from parallel.planning.layout import Topology

Result = TypeVar("Result")

# The layers' group of each `join` that is open, innermost last, and what is said of nodes by
# `World.node_sizes`, for a `join` inside it.
_joined: list[tuple[dist.ProcessGroup | None, tuple[int, ...]]] = []


@dataclass(frozen=True)
class World:
    """This process and its place among the ranks.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank: its number on its node, and the number of its GPU.
        device: where its tensors are.
        ranks_per_node: rank r is on node r // ranks_per_node, unless `node_sizes` are given.
        node_sizes: ranks of each node, where a node before the last one has fewer than others.
        group: a second group of all ranks, for the messages of layers, so that these do not queue
            behind the optimiser's. None: the default group.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    ranks_per_node: int = 1
    node_sizes: tuple[int, ...] = ()
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def topology(self) -> Topology:
        return Topology(self.size, self.ranks_per_node, self.node_sizes)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of `values` over all ranks, in place."""
        if self.size > 1:
            with waiting_for(None):
                dist.all_reduce(values)
        return values

    def broadcast(self, values: torch.Tensor, owner: int) -> None:
        """Set `values` on all ranks to those of rank `owner`."""
        if self.size > 1:
            with waiting_for(owner):
                dist.broadcast(values, owner)

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of every rank, of one shape and dtype: (…) -> (size, …)."""
        every = values.new_empty((self.size, *values.shape))
        if self.size == 1:
            every[0] = values
            return every
        with waiting_for(None):
            dist.all_gather(list(every), values)
        return every

    def barrier(self) -> None:
        if self.size > 1:
            with waiting_for(None):
                dist.barrier()

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 only; every rank returns its picklable result, or raises its
        exception."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except Exception as fault:
                box[1] = fault
        with waiting_for(None if self.is_first else 0):
            dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """All-gather: the picklable `value` of every rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with waiting_for(None):
            dist.all_gather_object(values, value)
        return values


@contextmanager
def join(
    timeout: timedelta = timedelta(minutes=30), layers: timedelta = timedelta(minutes=10)
) -> Iterator[World]:
    """Join the ranks that torchrun or srun started, or make a world of one.

    NCCL on GPUs, gloo on CPUs. Rank and size come from RANK, WORLD_SIZE and LOCAL_RANK, or from
    SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID if MASTER_ADDR is set, which says that a rendezvous
    was prepared for srun's tasks. Inside another `join` the world is the same one: DeepSpeed keeps
    the first one's groups for as long as the process lives.

    Args:
        timeout: how long a rank waits for another before it gives up (`parallel.peers`). Long,
            since ranks may wait for the one that prepares a corpus.
        layers: the same for waiting inside a layer.
    """
    environment = os.environ
    rank, size, local_rank, ranks_per_node = 0, 1, 0, 1
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        ranks_per_node = int(environment.get("LOCAL_WORLD_SIZE", size))
    elif "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        local_rank = int(environment["SLURM_LOCALID"])
        node = int(environment.get("SLURM_NODEID", "0"))
        ranks_per_node = _tasks(environment.get("SLURM_TASKS_PER_NODE", ""), node) or size

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        group, sizes = _joined[-1] if _joined else (None, ())
        ranks_per_node = max(sizes, default=ranks_per_node)
        yield World(rank, size, local_rank, device, ranks_per_node, sizes, group)
        return
    # A world of one needs no port; a store in memory cannot collide with a neighbour's run.
    store: dist.Store = dist.HashStore()
    if size > 1:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store.set_timeout(timeout)
        join_store(store, rank, size)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("world", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    group = dist.new_group(timeout=layers) if size > 1 else None
    if group is not None:
        # NCCL sets a group up when it is first used, and all ranks must take part in that use.
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    ranks_per_node, sizes = _nodes(ranks_per_node, size)
    _joined.append((group, sizes))
    try:
        yield World(rank, size, local_rank, device, ranks_per_node, sizes, group)
    finally:
        _joined.pop()
        dist.destroy_process_group()


def _tasks(per_node: str, node: int) -> int:
    """How many tasks Slurm started on a node; 0 if `per_node` does not say.

    Args:
        per_node: "8(x3),4" is eight tasks on each of three nodes and four on one more.
    """
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    return tasks[min(node, len(tasks) - 1)] if tasks else 0


def _nodes(mine: int, size: int) -> tuple[int, tuple[int, ...]]:
    """Ranks of a full node, and `World.node_sizes`. All ranks call it, since each knows only its
    own node.

    Args:
        mine: ranks of this rank's node.
    """
    if size == 1:
        return mine, ()
    said = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(said, torch.tensor([mine]))
    of_rank = [int(each) for each in said]
    sizes: list[int] = []
    while sum(sizes) < size:
        sizes.append(of_rank[sum(sizes)])
    full = max(sizes)
    regular = sum(sizes) != size or all(each == full for each in sizes[:-1])
    return full, () if regular else tuple(sizes)
