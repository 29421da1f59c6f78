"""How long a step takes on a described cluster, by the prices of the plan that training would make.

Left out are reading and evaluating, what a GPU waits for its CPU, and whatever a cluster's file
does not know of. So the step is what well-fed GPUs would take. All matrices that a token meets,
those of experts too, count as large products, and experts as evenly chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
from parallel.planning.costs import Costs
from parallel.planning.layout import Array
from parallel.planning.states import price_states
from parallel.travel.homes import Homes
from train.experts import layers_of
from train.forecast.case import Case
from train.model.linear import met
from train.optimiser.optim import is_orthogonal
from train.planning import described

DAY = 86400.0
_LOOKED_AT = 4  # batches of a prepared corpus
_FP32 = 4.0
_NUMBER = 2.0  # bytes of an expert's number (`parallel.travel.rows`)
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
        rows: in which rows travel to experts and back, beyond the work of the shared expert.
        zero: in which ZeRO's traffic takes longer than all of that.
        optimiser: of the update.
        even: of the passes if all work were even and no byte were sent.
        tokens: of the step.
        mfu: model FLOPs of the step as a share of what the GPUs could do at their peak.
    """

    passes: float
    anew: float
    rows: float
    zero: float
    optimiser: float
    even: float
    tokens: int
    mfu: float

    @property
    def step(self) -> float:
        return self.passes + self.anew + self.rows + self.zero + self.optimiser


@dataclass(frozen=True)
class Speed:
    """A case on a cluster."""

    case: Case
    cluster: Cluster

    def times(self, batches: Iterable[Array]) -> Times:
        """Of steps on batches like these, (N,) lengths each; means over the batches."""
        found = [self._batch(lengths) for lengths in batches]
        passes, anew, rows, zero, even, flops = (
            float(np.mean(each)) for each in zip(*found, strict=True)
        )
        train = self.case.config.train
        whole = train.accumulate
        optimiser = self._optimiser()
        seconds = whole * (passes + anew + rows + zero) + optimiser
        peak = self.cluster.tflops * 1e12 * self.case.ranks
        return Times(
            whole * passes,
            whole * anew,
            whole * rows,
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
        numbers = self.case.numbers_at_home
        return described(self.case.model, self.case.dtype, stage, accumulate, numbers)

    @cached_property
    def _homes(self) -> dict[str, tuple[Homes, bool]]:
        config = self.case.config
        return self.case.homes(config.zero.stage, config.model.checkpoint_activations)

    def _batch(self, lengths: Array) -> tuple[float, float, float, float, float, float]:
        """Seconds of passes, of activations made anew, of rows, of ZeRO beyond these, of even work;
        FLOPs of a forward pass."""
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
        rows = self._rows(float(lengths.sum()) / case.ranks, free)
        zero = layers * max(costs.zero_seconds(topology)) if case.ranks > 1 else 0.0
        return (
            passes,
            anew,
            rows,
            max(0.0, zero - passes - anew - rows),
            layers * costs.even_seconds(lengths, case.ranks),
            case.model.flops(lengths),
        )

    def _rows(self, tokens: float, costs: Costs) -> float:
        """Seconds of a batch in which rows travel and nothing is computed, if a rank has so many
        tokens and any experts are as likely.

        A row goes there with its experts' numbers and weights, once to each node and then inside
        it, and back; so do gradients, and all of it again where activations are made anew. Beside
        the shared expert goes the first way of a pass, and the last one of the backward pass.
        """
        each = min(self.case.ranks_per_node, self.case.ranks)
        rates = min(costs.nic, costs.between / each), costs.inside
        latencies = costs.latency_between, costs.latency_inside
        layers, found = layers_of(self.case.model), 0.0
        anew = self.case.config.model.checkpoint_activations
        for name, (homes, _) in self._homes.items():
            layer = layers[name]
            row = layer.up.weight.shape[2] * self.case.dtype.itemsize
            weights, numbers = _FP32 * layer.chosen, _NUMBER * layer.chosen
            often = self._visits(homes, layer.chosen)
            there, gradient, back = (
                [
                    tokens * times * size / rate + late if times else 0.0
                    for times, rate, late in zip(often, rates, latencies, strict=True)
                ]
                for size in (row + weights + numbers, row + weights, row)
            )
            shared = 0 if layer.shared is None else met(layer.shared)
            beside = 2.0 * shared * tokens / costs.flops
            forward = sum(there) - min(there[0] or there[1], beside) + sum(back)
            backward = sum(back) + sum(gradient) - min(gradient[0] or gradient[1], 2 * beside)
            found += (2 if anew else 1) * forward + backward
        return found

    @cached_property
    def _visits(self) -> Callable[[Homes, int], tuple[float, float]]:
        """`Homes.visits`, which takes a while, once for all layers and batches."""
        return lru_cache(None)(Homes.visits)

    def _optimiser(self) -> float:
        """Seconds of the update: bytes of a GPU's memory, and Muon's products."""
        case, products, numbers = self.case, 0.0, 0.0
        home = case.at_home(self._homes)
        for name, shape in case.sizes.shapes.items():
            share = case.ranks if case.config.zero.stage or name in home else 1
            numbers += shape.numel() / share
            if is_orthogonal(name, shape, case.config.optim):
                rows, columns = sorted(shape[-2:])
                # x xᵀ and its product with x, and the square of that; of each matrix of a stack.
                each = 2.0 * rows * rows * (2 * columns + rows)
                products += math.prod(shape[:-2]) * _ITERATIONS * each / share
        moved = numbers * _STEPPED / (self.cluster.memory_gbs * 1e9)
        return moved + products / self.cluster.matmul_flops
