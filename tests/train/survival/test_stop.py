"""When a run stops: by which signal, and how long before the end of its time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from parallel import World
from tests.processes import ROOT
from train import __main__ as program
from train.survival.stop import SIGNALS, START_AGAIN, Cause, Interrupted, Watch

ONE = World(0, 1, 0, torch.device("cpu"))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGTERM, Cause.ORDER),
        (signal.SIGINT, Cause.ORDER),
        (signal.SIGUSR1, Cause.TIME),
    ],
)
def test_a_signal_stops_at_the_next_look(number: signal.Signals, cause: Cause) -> None:
    watch = Watch()
    watch.training = True
    with watch.listening():
        assert watch.agreed(ONE) == Cause.NONE
        os.kill(os.getpid(), number)
        assert watch.agreed(ONE) == cause
        assert watch.reason == number.name


def test_an_order_counts_more_than_a_warning() -> None:
    watch = Watch()
    watch.training = True
    with watch.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.agreed(ONE) == Cause.ORDER


def test_another_ranks_order_counts_more_than_a_warning_here() -> None:
    class Others:
        def sum(self, votes: torch.Tensor) -> torch.Tensor:
            return votes + torch.tensor([0.0, 1.0, 0.0])

    watch = Watch()
    watch.training = True
    with watch.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.agreed(Others()) == Cause.ORDER  # type: ignore[arg-type]


def test_before_training_a_signal_ends_the_work_at_once() -> None:
    with pytest.raises(Interrupted, match="SIGTERM"), Watch().listening():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("batch", "save", "most"), [(7, 30, 100), (60, 1, 192), (1, 200, 313)])
def test_the_clock_leaves_time_for_a_batch_and_a_save(batch: int, save: int, most: int) -> None:
    """Before an end at 1,000 s; in seconds. At most: what is left when it stops."""
    clock = Clock()
    watch = Watch(end=1000, clock=clock)
    watch.save_seconds = save
    while not watch.agreed(ONE):
        clock.now += batch
    assert 1000 - clock.now >= batch + save
    assert 1000 - clock.now <= most
    assert watch.reason == "the clock"


def test_a_time_of_saving_is_not_taken_for_a_batch() -> None:
    clock = Clock()
    watch = Watch(end=1000, clock=clock)
    watch.agreed(ONE)
    watch.pause()
    clock.now = 600
    assert watch.agreed(ONE) == Cause.NONE


def test_a_warning_before_the_first_step_leaves_it_to_the_clock() -> None:
    """A job shorter than its own warning would otherwise never train."""
    clock = Clock()
    watch = Watch(end=1000, clock=clock)
    with watch.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        watch.training = True
        assert watch.agreed(ONE) == Cause.NONE
        clock.now = 995
        assert watch.agreed(ONE) == Cause.TIME


def test_the_end_is_that_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    assert Watch.of_job().end == 1790000000
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    assert Watch.of_job().end is None


# In place of all that comes after listening has begun: what is imported by then, and who hears.
BEGUN = """
import signal, sys
from train import __main__ as program

def begun(config, options, watch):
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    heard = all(signal.getsignal(number) == watch._hear for number in numbers)
    print(heard, "torch" in sys.modules)
    return 0

program._run = begun
sys.exit(program.main(["configs/smoke.yaml"]))
"""


def test_a_run_listens_before_it_imports_what_takes_seconds() -> None:
    """A warning in these seconds would kill it: Slurm's comes at any time."""
    done = subprocess.run(
        [sys.executable, "-c", BEGUN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True False\n"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, START_AGAIN), (signal.SIGTERM, 0), (signal.SIGINT, 0)]
)
def test_a_run_that_is_warned_before_it_trains_asks_to_be_started_again(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_run", lambda *_: signal.raise_signal(number))
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert program.main([str(ROOT / "configs/smoke.yaml")]) == code


class Told:
    """What a process writes to its standard error, read while it goes on."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def __enter__(self) -> Told:
        self.before = os.dup(2)
        os.dup2(self.writer, 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self.before, 2)
        for handle in (self.reader, self.writer, self.before):
            os.close(handle)

    def line(self) -> str:
        """The next line, waited for."""
        read = b""
        while not read.endswith(b"\n"):
            read += os.read(self.reader, 1)
        return read.decode()


def at_work(step: int, saved: int | None) -> Watch:
    watch = Watch()
    watch.training = True
    watch.standing = lambda: (step, saved)
    return watch


def test_a_signal_is_told_while_the_main_thread_is_in_c_code() -> None:
    """The main thread waits in C for what another thread writes once it has read the line."""
    gate, opener = os.pipe()
    watch, said = at_work(11, None), []
    with Told() as told, watch.listening():

        def order() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            said.append(told.line())
            os.write(opener, b"x")

        thread = threading.Thread(target=order)
        thread.start()
        # It reaches the other thread: a read that it interrupted would return to Python.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        read = ctypes.CDLL(None).read
        assert read(gate, ctypes.create_string_buffer(1), 1) == 1
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        thread.join()
    os.close(gate)
    os.close(opener)
    assert said[0].startswith("SIGTERM has arrived after step 11: ")


def test_what_a_second_signal_would_lose_is_told_at_once() -> None:
    """Batches of 120 s, of which 50 are over, and saves of 8 s; step 20 is saved."""
    clock = Clock()
    watch = Watch(clock=clock)
    watch.training, watch.save_seconds, watch.standing = True, 8, lambda: (31, 20)
    watch.agreed(ONE)
    clock.now = 120
    watch.agreed(ONE)
    clock.now = 170
    with Told() as told, watch.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        line = told.line()
        os.kill(os.getpid(), signal.SIGUSR1)
        other = told.line()
    assert "at most 70 s" in line
    assert "about 8 s" in line
    assert "a second SIGTERM ends it at once and loses the 11 steps since the last check" in line
    assert "a second" not in other


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        (at_work(11, None), "loses the 11 steps since step 0"),
        (at_work(11, 11), "loses nothing"),
        (at_work(12, 11), "loses the step since"),
        (at_work(0, None), "loses nothing"),
    ],
)
def test_what_is_lost_is_counted(watch: Watch, said: str) -> None:
    with Told() as told, watch.listening():
        os.kill(os.getpid(), signal.SIGINT)
        line = told.line()
    assert line.startswith("SIGINT has arrived")
    assert "not measured yet" in line
    assert said in line


def test_a_signal_before_training_is_told_too() -> None:
    watch = Watch()
    with Told() as told:
        with pytest.raises(Interrupted), watch.listening():
            os.kill(os.getpid(), signal.SIGTERM)
        assert "nothing is being trained" in told.line()


def test_a_warning_that_is_left_to_the_clock_says_so() -> None:
    watch = Watch(end=1000, clock=Clock())
    with Told() as told, watch.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert "there is time left" in told.line()


def test_listening_leaves_everything_as_it_was() -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with Watch().listening():
        pass
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_ranks_look_inside_batches_where_batches_are_long() -> None:
    clock = Clock()
    watch = Watch(clock=clock)
    for seconds, long in [(0, False), (2, False), (120, True), (1, True)]:
        clock.now += seconds
        watch.agreed(ONE)
        assert watch.long_batches == long
