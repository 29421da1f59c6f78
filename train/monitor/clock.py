"""Where the time of a step goes: by kind of layer, waiting for messages, the optimiser.

Moments are taken at the borders of the parts of a step, and read when they are over: on a GPU they
are events on its stream, of which two are a few microseconds; on a CPU they are the clock's. So
nothing is waited for. The border of two blocks is the tensor that goes from one to the other: its
gradient is there when the backward pass crosses it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel import timing

DATA, EMBEDDING, LOSS = "data", "embedding", "loss"
REDUCING, OPTIMISER = "reducing", "optimiser"
WAITING = "waiting"  # standing still for a message of a layer, whichever it is
TRAVELLING = "travelling"  # messages of layers under way, most of it beside work
_WAITING_AT_MOST = 4  # steps whose moments are not over yet


class Clock:
    """Takes the moments of a rank's steps.

    Args:
        names: what blocks are called, first block first (`ModelConfig.block_kinds`).
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names, self._on_gpu = names, device.type == "cuda"
        self._forward = False
        self._marks: list[tuple[str | None, Any]] = []
        self._flights: list[tuple[Any, Any]] = []
        self._steps: list[tuple[int, list[Any], list[Any]]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Take moments at the borders of these blocks, in passes inside `forward`."""
        blocks[0].register_forward_pre_hook(self._begins)
        for number, block in enumerate(blocks):
            block.register_forward_hook(lambda *call, n=number: self._ends(n, call[-1]))
        timing.tell(self)

    def start(self) -> None:
        """A step begins."""
        self._marks, self._flights = [(None, self.now())], []

    def mark(self, name: str) -> None:
        """What was done since the last moment is `name`."""
        self._marks.append((name, self.now()))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass of training; not one in which activations are made anew."""
        self._forward = True
        try:
            yield
        finally:
            self._forward = False
        self.mark(LOSS)

    def stop(self, step: int) -> None:
        """The step is over."""
        self._steps = [*self._steps, (step, self._marks, self._flights)][-_WAITING_AT_MOST:]
        self._marks, self._flights = [], []

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Steps that are over on the device: their numbers, and seconds by name.

        All but `TRAVELLING` add up to the step.
        """
        while self._steps and self._is_over(self._steps[0][1][-1][1]):
            step, marks, flights = self._steps.pop(0)
            found = self._seconds(marks)
            found[TRAVELLING] = sum(self._between(*flight) for flight in flights)
            for name, seconds in found.items():
                self._sums[name] += seconds
            self._count += 1
            yield step, found

    def means(self) -> dict[str, float]:
        """Seconds of a step by name, on average since this was asked last."""
        found = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = defaultdict(float), 0
        return found

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waited(self, left: Any, came: Any) -> None:
        """See `parallel.timing.Observer`."""
        if self._marks:
            done = self.now()
            self._marks += [(None, came), (WAITING, done)]
            self._flights.append((left, done))

    def _begins(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The first block begins: what was since the last moment is the embedding."""
        if self._forward:
            self.mark(EMBEDDING)
            self._on_gradient(inputs[0], self._names[0])

    def _ends(self, number: int, y: Tensor) -> None:
        if self._forward:
            self.mark(self._names[number])
            self._on_gradient(y, [*self._names, LOSS][number + 1])

    def _on_gradient(self, border: Tensor, name: str) -> None:
        """Where the backward pass comes to a border, it leaves what is called `name`."""
        if border.requires_grad:
            border.register_hook(lambda _: self.mark(name))

    def _seconds(self, marks: Sequence[tuple[str | None, Any]]) -> dict[str, float]:
        """Seconds by name. Of None is what goes on after waiting: it has the name that follows."""
        found: dict[str, float] = defaultdict(float)
        pending = 0.0
        (_, last), *rest = marks
        for name, moment in rest:
            spent, last = self._between(last, moment), moment
            if name is None:
                pending += spent
            elif name == WAITING:
                found[name] += spent
            else:
                found[name] += spent + pending
                pending = 0.0
        return dict(found)

    def _is_over(self, moment: Any) -> bool:
        return moment.query() if self._on_gpu else True

    def _between(self, one: Any, two: Any) -> float:
        return one.elapsed_time(two) / 1e3 if self._on_gpu else two - one
