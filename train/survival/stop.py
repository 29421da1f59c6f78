"""When a run must stop: a signal asks for it, or the job's time is nearly up.

    SIGTERM, SIGINT   save and end; exit code 0. A second one acts at once.
    SIGUSR1           save and end, to be started again; exit code 75. Slurm's early warning.
    the clock         as SIGUSR1, when the time to `SLURM_JOB_END_TIME` is just enough for
                      another batch and a save, as measured so far.

A thread says at once what has arrived, even while the main thread is in C code and Python's
handlers have to wait. Where batches are long, the ranks look for signals inside them too.
Light: listening begins before torch is imported.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
_LONG_BATCH_S = 5.0  # between two looks; above it, ranks look inside batches too


_END = b"\0"  # no signal's number


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
        self.long_batches = False  # the same on every rank
        self.rank = 0
        # The step that is done, and the last one that is saved.
        self.standing: Callable[[], tuple[int, int | None]] = lambda: (0, None)
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
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        teller = threading.Thread(target=self._tell, args=(reader,), daemon=True)
        teller.start()
        # The interpreter writes each signal's number there, whatever the main thread does.
        woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            os.write(writer, _END)
            teller.join()
            os.close(writer)
            os.close(reader)

    def agreed(self, world: World) -> Cause:
        """Whether to stop now, the same answer on every rank. Call it between batches, and inside
        them if `long_batches`.

        One sum of three numbers between the CPUs: no device waits for it.
        """
        import torch

        cause = self._cause()
        long = max(self._laps) > _LONG_BATCH_S
        votes = torch.tensor([float(v) for v in (cause == Cause.TIME, cause == Cause.ORDER, long)])
        timed, ordered, slow = world.sum(votes).tolist()
        self.long_batches = bool(slow)
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

    def _tell(self, reader: int) -> None:
        """Say of the first signal of each kind what follows from it."""
        told: set[int] = set()
        while (number := os.read(reader, 1)) != _END:
            if number[0] in set(SIGNALS) - told:
                told.add(number[0])
                heard = signal.Signals(number[0])
                line = self._consequence(heard)
                # A second warning loses nothing: one rank tells of it, and not thousands.
                if heard == signal.SIGUSR1 and self.rank:
                    continue
                with suppress(OSError):
                    os.write(2, f"{line}\n".encode())

    def _consequence(self, heard: signal.Signals) -> str:
        said = f"{heard.name} has arrived" + (f" at rank {self.rank}" if self.rank else "")
        if heard == signal.SIGUSR1 and self._steps == 0 and self.end is not None:
            return f"{said} before the first step: there is time left, and the clock tells how much"
        if not self.training:
            return f"{said}, and nothing is being trained: the run ends"
        step, saved = self.standing()
        since = self._clock() - self._looked if self._looked is not None else 0.0
        left = max(self._laps) - since
        batch = f"at most {left:.0f} s, as measured so far" if left > 0 else "not measured yet"
        line = (
            f"{said} after step {step}: the run ends when the batch under way is done ({batch}) "
            f"and a checkpoint is saved (about {self.save_seconds:.0f} s)"
        )
        if heard == signal.SIGUSR1:
            return f"{line}, to be started again"
        lost = step - (saved or 0)
        steps = f"the {lost} steps" if lost > 1 else "the step"
        what = (
            f"{steps} since {'the last checkpoint' if saved else 'step 0'}" if lost else "nothing"
        )
        return f"{line}; a second {heard.name} ends it at once and loses {what}"

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
