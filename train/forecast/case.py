"""A run on so many ranks: its memory under every stage of ZeRO, with and without checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import parallel
from data.config import MOST_TOKENS, RECALL, longest_seq_len
from data.recall import Recall
from data.tokens.tokenizer import load
from parallel import Shard, World
from parallel.planning.clusters import MEMORY_SLACK
from parallel.planning.layout import Topology
from parallel.planning.planner import Planner, pad_to_ranks
from parallel.stream import share
from parallel.travel.homes import Homes
from train.config import Config
from train.experts import layers_of
from train.forecast import memory, work
from train.forecast.activations import Device, Part, Shape, parts
from train.forecast.states import at_home, states
from train.forecast.travelling import ImaginedRows
from train.model.transformer import Model, check_settings, skeleton
from train.planning import by_rows, planner_of

STAGES = (0, 1, 2, 3)
TRAVELLING, SLACK, RUNTIME = "travelling", "slack", "runtime"
# Bytes beside tensors. Of a GPU: CUDA's context and kernels, workspaces of products, NCCL's
# channels, and what the allocator cannot use; of a CPU: Python and the libraries.
_RUNTIME = {"cuda": 3e9, "cpu": 0.6e9}
# Tokens a rank at which parts are run. A CPU's ops are many, chunk by chunk: past the last size
# its bytes are taken from the line through the last two.
_SIZES: dict[Device, list[int]] = {
    "cuda": [1024, 4096, 16384, 65536, 262144],
    "cpu": [1024, 2048, 4096],
}
_Rows = tuple[tuple[str, tuple[Homes, bool]], ...]  # by kind of blocks, as `Case.homes`
_PLANNED = 64  # ranks, at most, of a plan for one sequence


@dataclass(frozen=True)
class Memory:
    """What a rank holds at the worst moment of a step.

    Attributes:
        stage, checkpointed: of ZeRO; of activations.
        kinds: bytes by kind. Those of layers, the embedding and the loss go by their names;
            `travelling` is what layers hold for other ranks' sake, `slack` what a rank may hold
            above the others, `runtime` what is no tensor.
    """

    stage: int
    checkpointed: bool
    kinds: dict[str, float]

    @property
    def tensors(self) -> float:
        """Bytes of tensors if shards are even: what an allocator's peak is compared with."""
        return self.total - self.kinds[SLACK] - self.kinds[RUNTIME]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Case:
    """A run on `ranks` ranks, `ranks_per_node` on a node, each with `room` bytes.

    Attributes:
        device: of the ranks.
        dtype: of weights and activations.
        cluster: its name or file, by whose speeds plans are made and priced; None if not known.
    """

    config: Config
    ranks: int
    ranks_per_node: int
    room: float
    device: Device
    dtype: torch.dtype
    cluster: str | None = None

    @cached_property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer; of one that text will train, as many as it is asked for."""
        data = self.config.data
        if data.source == RECALL:
            return Recall(data.recall, self.config.train).tokenizer.vocab_size
        return load(Path(data.tokenizer)).vocab_size if data.tokenizer else data.vocab_size

    @cached_property
    def model(self) -> Model:
        """On meta tensors."""
        check_settings(self.config.model)
        return skeleton(self.config.model, self.vocab_size)

    @cached_property
    def sizes(self) -> work.Sizes:
        return work.sizes(self.model)

    def on(self, ranks: int) -> Case:
        """The same run on another number of ranks."""
        made = replace(self, ranks=ranks, ranks_per_node=min(ranks, self.ranks_per_node))
        # What does not depend on the ranks is not made again.
        made.__dict__.update(vocab_size=self.vocab_size, model=self.model, sizes=self.sizes)
        return made

    @property
    def tokens(self) -> int:
        """Of a rank in a batch, if shards are even."""
        return -(-self.config.train.batch_tokens // self.ranks)

    @property
    def seq_len(self) -> int:
        """The longest sequence of the whole run."""
        train = self.config.train
        return longest_seq_len(self.config.data, train, train.steps)

    def lengths(self, seq_len: int) -> np.ndarray:
        """A batch of full sequences, int64 (N,); the last one may be shorter."""
        return _sequences(self.config.train.batch_tokens, seq_len)

    def planner(self) -> Planner:
        world = World(0, self.ranks, 0, torch.device("meta"), self.ranks_per_node)
        given = self.config.parallel
        # Fewer ranks than the run's are looked at too.
        speeds = {rank: speed for rank, speed in given.speeds.items() if rank < self.ranks}
        config = replace(given, cluster=self.cluster, speeds=speeds)
        stage, accumulate = self.config.zero.stage, self.config.train.accumulate
        numbers = self.numbers_at_home
        return planner_of(self.model, config, world, self.dtype, stage, accumulate, numbers)

    def memory(self, stage: int, checkpointed: bool) -> Memory:
        """What a rank holds in a step on batches of full sequences."""
        layers = self._layers(stage, checkpointed)

        def peak(alone: bool, load: float | None = 1.0) -> dict[str, float]:
            made = self._parts(checkpointed, layers, alone, load)
            return self._peak(stage, checkpointed, made, self.tokens)

        kinds = fullest = peak(alone=False)
        if layers:
            fullest = peak(alone=False, load=ImaginedRows.spread)
        slack = sum(fullest.values()) + self._slack(fullest) - sum(kinds.values())
        if self.ranks > 1:
            by_itself = peak(alone=True, load=None)
            more = sum(kinds.values()) - sum(by_itself.values())
            kinds = {**by_itself, TRAVELLING: max(0.0, more)}
        kinds |= {SLACK: max(0.0, slack), RUNTIME: _RUNTIME[self.device]}
        return Memory(stage, checkpointed, kinds)

    # `lru_cache` on methods would keep every case alive.
    @cached_property
    def homes(self) -> Callable[[int, bool], dict[str, tuple[Homes, bool]]]:
        """By stage and checkpointing: homes of the experts to which rows travel, by the names of
        their MLPs, and whether the counts of a batch may overrule that."""
        return lru_cache(None)(self._homes)

    def _homes(self, stage: int, checkpointed: bool) -> dict[str, tuple[Homes, bool]]:
        if self.ranks == 1:
            return {}
        config = replace(
            self.config,
            zero=replace(self.config.zero, stage=stage),  # type: ignore[arg-type]
            model=replace(self.config.model, checkpoint_activations=checkpointed),
        )
        topology = Topology(self.ranks, self.ranks_per_node)
        found, layers = by_rows(config, self.model, topology, self.dtype), layers_of(self.model)
        return {
            name: (Homes(layers[name].up.weight.shape[0], topology), either)
            for name, either in found.items()
        }

    @property
    def numbers_at_home(self) -> int:
        """Of the experts' matrices that ZeRO has no part of, with the run's own settings."""
        config = self.config
        homes = self.homes(config.zero.stage, config.model.checkpoint_activations)
        return sum(shape.numel() for shape in self.at_home(homes).values())

    def at_home(self, homes: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Shapes of the experts' matrices of these MLPs, by name."""
        return {
            name: shape
            for name, shape in self.sizes.shapes.items()
            if name.removesuffix(".up.weight") in homes or name.removesuffix(".out.weight") in homes
        }

    def _layers(self, stage: int, checkpointed: bool) -> _Rows:
        """The kinds of blocks in which rows travel to experts: an MLP's settings are its kind's."""
        kinds = self.config.model.block_kinds
        found = self.homes(stage, checkpointed)
        return tuple({kinds[int(name.split(".")[1])]: each for name, each in found.items()}.items())

    def longest(self, stage: int, checkpointed: bool) -> int:
        """Tokens of the longest sequence that fits if it is the whole batch; 0 if none does."""
        sizes, layers = _SIZES[self.device], self._layers(stage, checkpointed)

        def at(tokens: int) -> dict[str, Part]:
            return self._of_one(checkpointed, layers, tokens)

        def fits(tokens: int, made: dict[str, Part]) -> bool:
            kinds = self._peak(stage, checkpointed, made, tokens)
            held = sum(kinds.values()) + self._slack(kinds) + _RUNTIME[self.device]
            return held <= self.room

        # Between two sizes, and past the last one, bytes lie on a line.
        last = next(
            (i for i, n in enumerate(sizes) if i and not fits(n, at(n))),
            len(sizes) - 1,
        )
        one, two = (at(n) for n in sizes[last - 1 : last + 1])

        def between(tokens: int) -> dict[str, Part]:
            return _on_line(one, two, (tokens - sizes[last - 1]) / (sizes[last] - sizes[last - 1]))

        low, high = 0, MOST_TOKENS // self.ranks
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle, between(middle)) else (low, middle - 1)
        return low * self.ranks

    def _peak(
        self, stage: int, checkpointed: bool, made: dict[str, Part], tokens: int
    ) -> dict[str, float]:
        config, homes = self.config, self.homes(stage, checkpointed)
        home = self.at_home(homes)
        of_zero = {n: shape for n, shape in self.sizes.shapes.items() if n not in home}
        stacks = {n: (shape, homes[n.rsplit(".", 2)[0]][0]) for n, shape in home.items()}
        return memory.Step(
            config.model.block_kinds,
            made,
            states(of_zero, config.optim, stage, self.ranks, self.dtype),
            tokens,
            config.train.accumulate,
            config.model.tie_embeddings,
            at_home(stacks, config.optim, self.dtype),
        ).peak()

    def _slack(self, kinds: dict[str, float]) -> float:
        """What a plan may give a rank above its even share of activations."""
        fixed = (memory.WEIGHTS, memory.OPTIMISER, memory.GRADIENTS, memory.BUFFERS)
        moving = sum(size for kind, size in kinds.items() if kind not in fixed)
        return MEMORY_SLACK * moving if self.ranks > 1 else 0.0

    @cached_property
    def _parts(self) -> Callable[[bool, _Rows, bool, float | None], dict[str, Part]]:
        """Of batches of full sequences: the parts on a rank among others, or on one alone; its
        experts have so many rows (`ImaginedRows.load`)."""

        def made(
            checkpointed: bool, layers: _Rows, alone: bool, load: float | None
        ) -> dict[str, Part]:
            shape = self._shape(checkpointed, layers, load)
            return (self.on(1) if alone else self)._at(self.tokens, shape)

        return lru_cache(None)(made)

    @cached_property
    def _of_one(self) -> Callable[[bool, _Rows, int], dict[str, Part]]:
        """The parts of a batch that is one sequence, by its tokens a rank."""

        # On more ranks a rank holds little else, and the plan takes longer.
        few = self.on(min(self.ranks, _PLANNED))

        def made(checkpointed: bool, layers: _Rows, tokens: int) -> dict[str, Part]:
            shard = few._shard(np.array([tokens * few.ranks]))
            shape = self._shape(checkpointed, layers, ImaginedRows.spread)
            return parts(self.config.model, shape, shard)

        return lru_cache(None)(made)

    def _at(self, tokens: int, shape: Shape) -> dict[str, Part]:
        """The parts of a batch of full sequences, by its tokens a rank."""
        sizes = _SIZES[self.device][-2:]
        if self.device == "cpu" and tokens > sizes[-1]:
            one, two = (self._at(n, shape) for n in sizes)
            return _on_line(one, two, (tokens - sizes[0]) / (sizes[1] - sizes[0]))
        shard = self._shard(_sequences(tokens * self.ranks, self.seq_len))
        return parts(self.config.model, shape, shard)

    def _shape(self, checkpointed: bool, layers: _Rows, load: float | None) -> Shape:
        rows = {kind: ImaginedRows(homes, either, load) for kind, (homes, either) in layers}
        return Shape(self.device, self.dtype, self.vocab_size, checkpointed, rows)

    def _shard(self, lengths: np.ndarray) -> Shard:
        """What the fullest rank has of a batch."""
        if self.ranks == 1:
            return parallel.shard(lengths, "cpu")
        with closing(self.planner()) as planner:
            rank = int(planner.plan(lengths).stream.tokens.argmax())
            world = World(rank, self.ranks, 0, torch.device("meta"), self.ranks_per_node)
            return share(pad_to_ranks(lengths, self.ranks), world, planner)[0]


def _on_line(one: dict[str, Part], two: dict[str, Part], way: float) -> dict[str, Part]:
    """The parts at a point of the line from `one` (0) to `two` (1)."""
    return {name: part.towards(two[name], way) for name, part in one.items()}


def _sequences(total: int, seq_len: int) -> np.ndarray:
    """Lengths (N,) of sequences of `seq_len` tokens, `total` in all; the last may be shorter."""
    whole, rest = divmod(total, seq_len)
    return np.array([seq_len] * whole + [rest] * (rest > 0), dtype=np.int64)
