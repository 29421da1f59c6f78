"""When a run must stop: a signal asks for it, or the job's time is nearly up.

    SIGTERM, SIGINT   save and end; exit code 0. A second one acts at once.
    SIGUSR1           save and end, to be started again; exit code 75. Slurm's early warning.
    the clock         as SIGUSR1, when the time to `SLURM_JOB_END_TIME` is just enough for
                      another batch and a save, as measured so far.

Light: listening begins before torch is imported.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel import World

# What `python -m train` exits with when it has saved and wants to be started again.
START_AGAIN = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_RESERVE_S = 10.0  # for leaving the job, and for a batch or a save slower than any before
_UNMEASURED_SAVE_S = 10.0


class Cause(IntEnum):
    """Why to stop; of two causes the larger counts."""

    NONE = 0
    TIME = 1
    ORDER = 2


class Interrupted(BaseException):
    """A signal came while nothing was being trained: there is nothing to save."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number


class Watch:
    """Hears signals and looks at the clock.

    Args:
        end: when the job's time is up, in seconds of `clock`; None if there is no limit.
    """

    def __init__(self, end: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self.end, self._clock = end, clock
        self.signal: signal.Signals | None = None
        self.training = False
        self.save_seconds = _UNMEASURED_SAVE_S
        self._laps: deque[float] = deque([0.0], maxlen=64)
        self._looked: float | None = None
        self._early = False
        self._steps = 0

    @classmethod
    def of_job(cls) -> Watch:
        """For the job that this process runs in, by Slurm's variables."""
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        return cls(float(end) if end.isdecimal() else None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        before: dict[signal.Signals, Any] = {n: signal.getsignal(n) for n in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, world: World) -> Cause:
        """Whether to stop now, the same answer on every rank. Call it between batches.

        One sum of two numbers between the CPUs: no device waits for it.
        """
        import torch

        cause = self._cause()
        votes = torch.tensor([float(cause == Cause.TIME), float(cause == Cause.ORDER)])
        timed, ordered = world.sum(votes).tolist()
        return Cause.ORDER if ordered else Cause.TIME if timed else Cause.NONE

    def step_done(self) -> None:
        self._steps += 1

    def pause(self) -> None:
        """What comes now, a save for instance, is no measure of the time between two looks."""
        self._looked = None

    @property
    def reason(self) -> str:
        """In words, for the log."""
        if self.signal is not None:
            return self.signal.name
        near = self.end is not None and self._time_is_up()
        return "the clock" if near else "another rank"

    def _cause(self) -> Cause:
        now = self._clock()
        if self._looked is not None:
            self._laps.append(now - self._looked)
        self._looked = now
        if self.signal in (signal.SIGTERM, signal.SIGINT):
            return Cause.ORDER
        # A limit shorter than its own warning: there is time yet, and the clock tells how much.
        warned = self.signal == signal.SIGUSR1 and not (self._early and self.end is not None)
        return Cause.TIME if warned or self._time_is_up() else Cause.NONE

    def _time_is_up(self) -> bool:
        if self.end is None:
            return False
        needed = 2 * max(self._laps) + 1.5 * self.save_seconds + _RESERVE_S
        return self._clock() + needed > self.end

    def _hear(self, number: int, _: FrameType | None) -> None:
        heard = signal.Signals(number)
        if heard in (signal.SIGTERM, signal.SIGINT):
            again = signal.SIG_DFL if heard == signal.SIGTERM else signal.default_int_handler
            signal.signal(heard, again)
        elif self.signal is not None:
            return
        else:
            self._early = self._steps == 0
        self.signal = heard
        if not self.training and not (self._early and self.end is not None):
            raise Interrupted(heard)
