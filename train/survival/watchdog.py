"""A rank that hangs is named, with the stack of every rank, and the run ends to start again.

Beside training every rank writes how far it has come, some times in `faults.hang_seconds`:

    runs/<name>/beats/rank-00003.json    step, what it does, since when, its stack

Ranks work in step, so that all soon wait for one that hangs. A rank that has not come any
further for `faults.hang_seconds` reads what all have written, twice, some beats apart:

    silent    nothing new was written: the process is dead or stopped, its machine is gone,
              or it is in C code that lets no Python run
    behind    it has made fewer collective calls than others, and does not itself wait

The first to know writes the report to its standard error and to the run's log; all end with
exit code 70, a fault like any other. No rank is special and no message is sent: what cannot
talk any more is what this is about.

Work that is made for the first time (it may compile), a save that waits for the disk, and
clearing up may take `_PATIENCE` times as long. Nothing is watched before training begins.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from data import regular
from data.settings import ConfigError
from parallel import LostRankError, World

BEATS = "beats"  # their folder in the run's
HANGS = os.EX_SOFTWARE  # what a run ends with in which a rank hangs
_PATIENCE = 10
_LONGEST_INTERVAL_S = 2.5
_LOOK_INTERVALS = 3  # between the two times that a rank reads the others' beats
_BYTES = 8192  # of a beat; always as many, so that a full disk has room for the next one


@dataclass(frozen=True)
class Beat:
    """What a rank writes of itself.

    age: seconds since it came any further. limit: the age at which it hangs. first: what it
    does is done for the first time. calls: of collectives that every rank makes alike.
    waits: it waits for other ranks. stack: innermost call last.
    """

    number: int
    host: str
    process: int
    step: int
    doing: str
    age: float
    limit: float
    first: bool
    calls: int
    waits: bool
    stack: list[str]

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}, step {self.step}, {self.doing}"


class Watchdog:
    """Watches this rank's main thread, and the other ranks when it stands still.

    Args:
        folder: the run's.
        seconds: without progress after which a rank hangs; 0 for never.
        end: what ends this process at once.
    """

    def __init__(
        self, folder: Path, world: World, seconds: float, end: Callable[[int], None] = os._exit
    ) -> None:
        self.folder, self.world, self.seconds, self._end = folder, world, seconds, end
        self.interval = min(_LONGEST_INTERVAL_S, seconds / 10)
        self._main = threading.get_ident()
        self._step, self._doing, self._since = 0, "", time.monotonic()
        self._patient = False
        self._known = {""}
        self._number = 0
        self._beaten = self._looked = time.monotonic()
        self._over = threading.Event()

    def at(self, step: int, doing: str) -> None:
        """The main thread has come so far: `step` is under way, and it begins `doing`."""
        self._known.add(self._doing)
        self._step, self._doing, self._since = step, doing, time.monotonic()

    @contextmanager
    def patience(self, doing: str) -> Iterator[None]:
        """Something that may well take minutes: a slow disk is no fault."""
        self.at(self._step, doing)
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
            self.at(self._step, doing)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the block, which all ranks enter together.

        Where it ends with a fault, ranks that have fallen silent are named first: theirs may
        be the cause.
        """
        if not self.seconds:
            yield
            return
        place = self.folder / BEATS
        self.world.on_first(lambda: _clear(place))
        self.at(self._step, "beginning")
        self._beat()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        except ConfigError:
            raise
        except Exception as fault:
            if isinstance(fault, LostRankError):
                self._note(str(fault))
            elif self.world.size > 1:
                self._tell_who_is_silent()
            raise
        finally:
            self._over.set()
            thread.join()
        with suppress(OSError):
            self._path(self.world.rank).unlink()

    def _watch(self) -> None:
        try:
            self._dump_later()
            while not self._over.wait(self.interval):
                now = time.monotonic()
                if now - self._beaten > 5 * self.interval:
                    # This process was stopped as a whole, and has just gone on.
                    self._since = now
                self._beat()
                self._dump_later()
                if now - max(self._since, self._looked) > self.seconds:
                    report = self._look()
                    self._looked = time.monotonic()
                    if report:
                        self._tell(report)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        """Write how far this rank is; what cannot be written is no fault."""
        self._beaten = time.monotonic()
        self._number += 1
        frames = sys._current_frames()
        first = self._doing not in self._known
        beat = Beat(
            number=self._number,
            host=socket.gethostname(),
            process=os.getpid(),
            step=self._step,
            doing=self._doing,
            age=round(self._beaten - self._since, 1),
            limit=self.seconds * (_PATIENCE if first or self._patient else 1),
            first=first,
            calls=_collective_calls(self.world),
            waits=any(_waits(frame) for frame in _working(frames, self._main)),
            stack=_stack(frames, self._main),
        )
        with suppress(OSError):
            handle = regular.opened(self._path(self.world.rank), os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(handle, json.dumps(asdict(beat)).encode().ljust(_BYTES), 0)
            finally:
                os.close(handle)

    def _dump_later(self) -> None:
        """In C, where nothing of Python can run, this alone still tells where the rank is."""
        if sys.__stderr__ is not None:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback_later(self.seconds, file=sys.__stderr__)

    def _look(self) -> str | None:
        """What is wrong, with every rank's stack; None if this rank or another gets on."""
        since = self._since
        beats, silent = self._compare()
        if self._since != since:
            return None
        age = time.monotonic() - since
        silent = [r for r in silent if age > self._limit_of_silence(beats[r])]
        if silent:
            named = silent
            why = "silent, as what is dead, stopped or stuck in C"
        else:
            living = {r: beat for r, beat in enumerate(beats) if beat}
            named, why = _behind(living)
            if any(living[r].age < living[r].limit for r in named or living):
                return None
        who = f"rank {_listed(named)} hangs" if named else "all ranks hang"
        lines = [f"{who} at step {self._step}: {why}"]
        for rank, beat in enumerate(beats):
            said = f"{beat}, for {beat.age:.0f} s" if beat else "nothing was heard of it"
            lines.append(
                f"rank {rank} ({said})" + (", silent since then" if rank in silent else "")
            )
            lines += [f"    {call}" for call in (beat.stack if beat else [])]
        return "\n".join(lines)

    def _tell(self, report: str) -> None:
        """One rank tells everything, the others which rank it is about; and all end."""
        if self._is_first_to_tell():
            self._write_out(report)
        else:
            print(f"rank {self.world.rank}: {report.splitlines()[0]}", file=sys.stderr, flush=True)
            time.sleep(1)  # so that who ends the other ranks does not cut the report short
        self._end(HANGS)

    def _tell_who_is_silent(self) -> None:
        time.sleep(self.interval)
        beats, silent = self._compare()
        lines = [f"rank {rank} is gone; last seen: {beats[rank] or 'never'}" for rank in silent]
        if lines and self._is_first_to_tell():
            self._write_out("\n".join(lines))

    def _is_first_to_tell(self) -> bool:
        """True on one rank, and where that cannot be known."""
        try:
            claim = self.folder / BEATS / "report"
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _write_out(self, text: str) -> None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
        self._note(text)

    def _note(self, text: str) -> None:
        """Add to the run's log, which rank 0 may be unable to."""
        with suppress(OSError):
            handle = regular.opened(self.folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with open(handle, "a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _compare(self) -> tuple[list[Beat | None], list[int]]:
        """Every rank's last beat, and the ranks that have written none in some intervals."""
        before = [self._read(rank) for rank in range(self.world.size)]
        for _ in range(_LOOK_INTERVALS):
            time.sleep(self.interval)
            self._beat()
        after = [self._read(rank) for rank in range(self.world.size)]
        silent = [r for r in range(self.world.size) if before[r] == after[r]]
        # Where not even this rank's beat arrives, silence says nothing.
        return after, [] if self.world.rank in silent else silent

    def _read(self, rank: int) -> Beat | None:
        with suppress(OSError, ValueError, TypeError):
            return Beat(**json.loads(regular.content(self._path(rank))))
        return None

    def _path(self, rank: int) -> Path:
        return self.folder / BEATS / f"rank-{rank:05d}.json"

    def _limit_of_silence(self, beat: Beat | None) -> float:
        """A compiler may keep Python from running, a disk may not."""
        return self.seconds * (_PATIENCE if beat and beat.first else 1)


def _clear(place: Path) -> None:
    """What an earlier start has left would be taken for this one's."""
    with suppress(OSError):
        if place.is_symlink():
            place.unlink()
        place.mkdir(exist_ok=True)
        for path in [*place.glob("rank-*.json"), place / "report"]:
            path.unlink(missing_ok=True)


def _behind(beats: dict[int, Beat]) -> tuple[list[int], str]:
    """The ranks for which the others wait, and how that is known; none if it is not."""
    if len(beats) == 1:
        return list(beats), "it gets no further"
    fewest = min(beat.calls for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.calls == fewest]
    busy = [rank for rank in behind if not beats[rank].waits]
    if busy and len(busy) < len(beats):
        return busy, "the others wait for it"
    if len(behind) < len(beats):
        return behind, f"it has made {fewest} collective calls, others more"
    return [], "none is behind the others"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _collective_calls(world: World) -> int:
    """Calls so far that every rank makes alike; those of layers depend on the sequences."""
    if world.size == 1 or not dist.is_initialized():
        return 0
    total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not world.group:
            with suppress(RuntimeError):
                backend: Any = group._get_backend(world.device)
                total += backend._get_sequence_number_for_group()
    return total


def _working(frames: dict[int, FrameType], main: int) -> list[FrameType]:
    """The frames of the main thread, and of autograd's, which runs backward passes on a GPU."""
    working = [frames[main]] if main in frames else []
    for thread, frame in frames.items():
        outer: FrameType | None = frame
        while outer is not None and outer.f_back is not None:
            outer = outer.f_back
        if thread != main and outer is not None and "torch/autograd" in outer.f_code.co_filename:
            working.append(frame)
    return working


def _waits(frame: FrameType) -> bool:
    """Whether the innermost calls are those of torch's collectives."""
    summary = traceback.extract_stack(frame, limit=3)
    return any("torch/distributed" in f.filename for f in summary) or (
        bool(summary) and ".wait(" in (summary[-1].line or "")
    )


def _stack(frames: dict[int, FrameType], main: int) -> list[str]:
    """The calls of the working threads, as many of the innermost as fit into a beat."""
    lines: list[str] = []
    for frame in _working(frames, main):
        for call in traceback.extract_stack(frame, limit=40):
            if "torch/nn/modules" in call.filename:  # between any two modules of a model
                continue
            lines.append(f"{call.filename}:{call.lineno} in {call.name}: {call.line}"[:240])
    while len(json.dumps(lines)) > _BYTES - 1024:
        del lines[0]
    return lines
