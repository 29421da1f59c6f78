"""When a run stops: by which signal, and how long before the end of its time."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from parallel import World
from train.survival.stop import Cause, Interrupted, Watch

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


def test_before_training_a_signal_ends_the_work_at_once() -> None:
    with pytest.raises(Interrupted, match="SIGTERM"), Watch().listening():
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_clock_leaves_time_for_a_batch_and_a_save() -> None:
    """Batches of 7 s and saves of 30 s before an end at 1,000 s."""
    clock = Clock()
    watch = Watch(end=1000, clock=clock)
    watch.save_seconds = 30
    while not watch.agreed(ONE):
        clock.now += 7
    assert 1000 - clock.now >= 7 + 30
    assert 1000 - clock.now <= 100
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
