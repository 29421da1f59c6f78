"""Looks of all ranks together, whether it is time to end; and where they are, for the watchdog."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from parallel import World, at_step
from train.survival.stop import Cause, Watch
from train.survival.watchdog import Watchdog


class GivenUpError(Exception):
    """It is time to end, and a step is under way."""


class Lookout:
    """Asks `watch` at the same places on every rank, so that all end after the same batch.

    Attributes:
        step: the step that is under way, counted from 1.
        cause: why to end; `Cause.NONE` as long as there is no reason.
    """

    def __init__(self, world: World, watch: Watch, watchdog: Watchdog) -> None:
        self.world, self.watch, self.watchdog = world, watch, watchdog
        self.step, self.cause = 0, Cause.NONE
        self._in_forward = False

    def at(self, doing: str) -> None:
        """Tell what begins, for messages about ranks that hang or are gone."""
        at_step(self.step)
        self.watchdog.at(self.step, doing)

    def stopping(self, doing: str) -> bool:
        """Whether it is time to save and end; asked before each batch, on all ranks together.

        Args:
            doing: what is done with the batch, for the watchdog.
        """
        self.at(doing)
        self.cause = max(self.cause, self.watch.agreed(self.world))
        return self.cause != Cause.NONE

    def look(self, doing: str) -> None:
        """Look whether it is time to end.

        Raises:
            GivenUpError: it is, on all ranks; the step that is under way does not count.
        """
        if self.stopping(doing):
            raise GivenUpError

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """A forward pass of training: the blocks look too, if batches are long (`look_inside`).

        Not so where the backward pass makes activations anew.
        """
        self._in_forward = True
        try:
            yield
            self.look_inside("backward")
        finally:
            self._in_forward = False

    def look_inside(self, doing: str = "forward") -> None:
        if self._in_forward and self.watch.long_batches:
            self.look(doing)
