"""How long a step takes on a described cluster, by the prices of the plan that training would make.

Left out are reading and evaluating, what a GPU waits for its CPU, and whatever a cluster's file
does not know of. So the step is what well-fed GPUs would take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise

import numpy as np

from data.batch import Cursor
from data.config import RECALL, seq_len_at
from data.prepare import prepared
from data.recall import Recall
from data.settings import ConfigError
from data.stream import Batches
from parallel.planning.clusters import Cluster
from parallel.planning.cost import price
from parallel.planning.layout import Array
from parallel.planning.states import price_states
from train.forecast.case import Case
from train.optimiser.optim import is_orthogonal
from train.planning import described

DAY = 86400.0
_LOOKED_AT = 4  # batches of a prepared corpus
_FP32 = 4.0
# What AdamW reads and writes of each number: gradient, weight and both means, three of them twice.
_STEPPED = 7 * _FP32
_ITERATIONS = 5  # of Newton and Schulz, in a step of Muon
_DISK = 1e9  # bytes a second that a node writes to a file system


@dataclass(frozen=True)
class Times:
    """Seconds of an optimiser step, and what it is worth.

    Attributes:
        passes: forward and backward, all batches of the step, on the ranks that take longest.
        anew: of activations that are made again.
        zero: in which ZeRO's traffic takes longer than all of that.
        optimiser: of the update.
        even: of the passes if all work were even and no byte were sent.
        tokens: of the step.
        mfu: model FLOPs of the step as a share of what the GPUs could do at their peak.
    """

    passes: float
    anew: float
    zero: float
    optimiser: float
    even: float
    tokens: int
    mfu: float

    @property
    def step(self) -> float:
        return self.passes + self.anew + self.zero + self.optimiser


@dataclass(frozen=True)
class Speed:
    """A case on a cluster."""

    case: Case
    cluster: Cluster

    def times(self, batches: Iterable[Array]) -> Times:
        """Of steps on batches like these, (N,) lengths each; means over the batches."""
        found = [self._batch(lengths) for lengths in batches]
        passes, anew, zero, even, flops = (
            float(np.mean(each)) for each in zip(*found, strict=True)
        )
        train = self.case.config.train
        whole = train.accumulate
        optimiser = self._optimiser()
        seconds = whole * (passes + anew + zero) + optimiser
        peak = self.cluster.tflops * 1e12 * self.case.ranks
        return Times(
            whole * passes,
            whole * anew,
            whole * zero,
            optimiser,
            whole * even,
            train.batch_tokens * whole,
            whole * 3 * flops / seconds / peak,
        )

    def stages(self) -> list[tuple[int, int, Times]]:
        """Each stretch of the run with one longest length: its steps, the length, a step's times.

        Of batches of full sequences.
        """
        config = self.case.config
        train, data = config.train, config.data
        begins = {stage["step"] for stage in data.stages if 0 < stage["step"] < train.steps}
        edges = [0, *sorted(begins), train.steps]
        found: list[tuple[int, int, Times]] = []
        for first, end in pairwise(edges):
            length = min(seq_len_at(data, train, first), train.batch_tokens)
            if found and found[-1][1] == length:
                found[-1] = (found[-1][0] + end - first, length, found[-1][2])
            else:
                found.append((end - first, length, self.times([self.case.lengths(length)])))
        return found

    def corpus(self) -> list[Array] | None:
        """Lengths in the first batches of the run's own text, if it is prepared; (N,) each."""
        config = self.case.config
        if config.data.source == RECALL:
            made = next(Recall(config.data.recall, config.train).batches(Cursor()))
            return [np.diff(made.cu_seqlens)]
        try:
            corpus = prepared(config.data)
        except ConfigError:
            return None
        if corpus is None:
            return None
        with closing(Batches(corpus, config.train, config.data)) as batches:
            return [np.diff(batch.cu_seqlens) for batch in islice(batches, _LOOKED_AT)]

    def saving(self, size: float) -> float:
        """Seconds until a checkpoint of so many bytes is written, at 1 GB/s a node."""
        nodes = -(-self.case.ranks // self.case.ranks_per_node)
        return size / _DISK / nodes

    @cached_property
    def _model(self):  # type: ignore[no-untyped-def]
        config = self.case.config
        stage, accumulate = config.zero.stage, config.train.accumulate
        return described(self.case.model, self.case.dtype, stage, accumulate)

    def _batch(self, lengths: Array) -> tuple[float, float, float, float, float]:
        """Seconds of passes, of activations made anew, of ZeRO beyond these, of even work; FLOPs
        of a forward pass."""
        case, layers = self.case, self._model.layers
        costs = self._model.costs(self.cluster)
        with closing(case.planner()) as planner:
            made, topology = planner.plan(lengths), planner.topology
        free = costs.beside_zero(lengths, topology)
        layer = price(made, free)
        states, _ = price_states(made, free)
        linear = layers * free.states.layers if free.states else 0.0
        passes = layers * layer.seconds + linear * states
        anew = 0.0
        if case.config.model.checkpoint_activations:
            head = 2.0 * case.model.head.weight.numel() / free.flops
            forward = float(layer.slowest[0] + layer.exposed[0]) + layer.copied
            anew = layers * forward - head * float(made.stream.tokens.max())
        zero = layers * max(costs.zero_seconds(topology)) if case.ranks > 1 else 0.0
        return (
            passes,
            anew,
            max(0.0, zero - passes - anew),
            layers * costs.even_seconds(lengths, case.ranks),
            case.model.flops(lengths),
        )

    def _optimiser(self) -> float:
        """Seconds of the update: bytes of a GPU's memory, and Muon's products."""
        case, products = self.case, 0.0
        share = case.ranks if case.config.zero.stage else 1
        for name, shape in case.sizes.shapes.items():
            if is_orthogonal(name, shape, case.config.optim):
                rows, columns = sorted(shape[-2:])
                # x xᵀ and its product with x, and the square of that; of each matrix of a stack.
                each = 2.0 * rows * rows * (2 * columns + rows)
                products += math.prod(shape[:-2]) * _ITERATIONS * each
        numbers = case.sizes.total * _STEPPED / share / (self.cluster.memory_gbs * 1e9)
        return numbers + products / share / self.cluster.matmul_flops
