"""A rank that hangs or dies is named in time, with every rank's stack; slow work is let be."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from parallel import World
from tests.train.runs import losses, start_ranks
from train.__main__ import main
from train.survival.watchdog import HANGS, Watchdog


class Ending:
    """Stands in for the end of a process: what it was asked to end with."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.asked = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.asked.set()
        sys.exit()  # the watchdog's thread


def oversleep(ending: Ending) -> None:
    assert ending.asked.wait(60)


def hang(world: World, folder: Path, sick: int) -> tuple[list[int], float]:
    """One rank sleeps while the others wait for it; the codes, and after how many seconds."""
    ending = Ending()
    watchdog = Watchdog(folder, world, 2.0, ending)
    with watchdog.watching():
        for step in (1, 2, 3):
            for doing in ("forward", "backward"):
                watchdog.at(step, doing)
                world.sum(torch.ones(1))
        watchdog.at(4, "forward")
        began = time.monotonic()
        if world.rank == sick:
            oversleep(ending)
        world.sum(torch.ones(1))
        ending.asked.wait(60)
        return ending.codes, time.monotonic() - began


@pytest.mark.parametrize("sick", [0, 2])
def test_a_rank_that_sleeps_is_named_with_every_stack(ranks, tmp_path: Path, sick: int) -> None:
    for codes, seconds in ranks(3).run(hang, tmp_path, sick):
        assert codes == [HANGS]
        assert 2 < seconds < 15
    report = (tmp_path / "log.txt").read_text()
    assert f"rank {sick} hangs at step 4: the others wait for it" in report
    sections = re.split(r"^rank \d .*step 4, forward, for \d+ s\)$", report, flags=re.MULTILINE)
    assert len(sections) == 4
    for rank, section in enumerate(sections[1:]):
        assert ("in oversleep" in section) == (rank == sick)
        assert ("all_reduce" in section) == (rank != sick)


def be_slow(world: World, folder: Path) -> list[int]:
    """What may take longer than the limit, on one rank or on all."""
    ending = Ending()
    watchdog = Watchdog(folder, world, 1.0, ending)
    with watchdog.watching():
        watchdog.at(1, "forward")
        time.sleep(3 if world.rank else 0)  # compiles
        world.sum(torch.ones(1))
        watchdog.at(2, "forward")
        for _ in range(10):
            time.sleep(0.3)
            watchdog.at(2, "evaluation")
        world.sum(torch.ones(1))
        watchdog.at(3, "forward")
        if not world.rank:
            with watchdog.patience("waiting for a save"):
                time.sleep(3)
        world.sum(torch.ones(1))
    world.barrier()
    assert not list((folder / "beats").iterdir())
    return ending.codes


def test_slow_work_is_let_be(ranks, tmp_path: Path) -> None:
    """Compiling, an evaluation of many batches, and a disk for which the others wait."""
    assert ranks(3).run(be_slow, tmp_path) == [[], [], []]


def test_beats_of_before_go_and_nothing_else(tmp_path: Path) -> None:
    beats, elsewhere = tmp_path / "beats", tmp_path / "elsewhere"
    for folder in (beats, elsewhere):
        folder.mkdir()
        for name in ("rank-00003.json", "report", "notes.txt"):
            (folder / name).write_text("before")
    world = World(0, 1, 0, torch.device("cpu"))
    with Watchdog(tmp_path, world, 100.0).watching():
        assert {path.name for path in beats.iterdir()} == {"rank-00000.json", "notes.txt"}
    beats.rename(tmp_path / "old")
    beats.symlink_to(elsewhere)
    with Watchdog(tmp_path, world, 100.0).watching():
        assert [path.name for path in beats.iterdir()] == ["rank-00000.json"]
    assert len(list(elsewhere.iterdir())) == 3


@pytest.mark.parametrize(
    ("illness", "sick", "limit", "code"), [("stop", 0, 4, HANGS), ("kill", 1, 60, 1)]
)
def test_a_rank_that_is_stopped_or_killed_is_named_and_the_run_goes_on(
    config: Path, undisturbed: Path, tmp_path: Path, illness: str, sick: int, limit: int, code: int
) -> None:
    """The sixth batch is that of the third step: step 2 is saved, or step 0 is all there is."""
    settings = (f"run.root={tmp_path}", f"faults.hang_seconds={limit}")
    processes = start_ranks(2, sick, 6, illness, config, *settings)
    try:
        output, _ = processes[1 - sick].communicate(timeout=100)
        assert processes[1 - sick].returncode == code, output
        if illness == "stop":
            assert processes[sick].poll() is None
            assert f"rank {sick} hangs at step 3: silent" in output
            # A stack of each; that of the stopped rank is from some moment before.
            assert re.search(r"^rank 0 \(.*silent since then\n    .+:\d+ in ", output, re.M)
            assert re.search(r"^rank 1 \((.|\n    )*in train_step: ", output, re.MULTILINE)
        else:
            assert processes[sick].wait(10) == -signal.SIGKILL
            assert f"rank {sick} is gone" in output
        assert f"rank {sick} " in (tmp_path / "tiny" / "log.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert main([str(config), f"run.root={tmp_path}"]) == 0
    assert losses(tmp_path / "tiny") == pytest.approx(losses(undisturbed), rel=1e-5)


class Jumps:
    """A clock that jumps by so many seconds at each wait, and the event that is waited for."""

    def __init__(self, *seconds: float) -> None:
        self.left, self.now = list(seconds), 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float) -> bool:
        if self.left:
            self.now += self.left.pop(0)
            return False
        return True

    def set(self) -> None:
        self.left.clear()


@pytest.mark.parametrize(
    ("jumps", "looks"),
    [
        ([1.0] * 12, 1),  # the main thread stands still
        ([1.0, 100.0, 1.0], 0),  # the process was stopped as a whole, and has just gone on
        ([1.0, 100.0] + [1.0] * 12, 1),  # and then stood still
    ],
    ids=["still", "stopped", "both"],
)
def test_a_process_that_was_stopped_as_a_whole_has_its_time_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jumps: list[float], looks: int
) -> None:
    clock = Jumps(*jumps)
    monkeypatch.setattr("train.survival.watchdog.time.monotonic", clock)
    (tmp_path / "beats").mkdir()
    watchdog = Watchdog(tmp_path, World(0, 1, 0, torch.device("cpu")), 10.0, Ending())
    watchdog.at(1, "forward")
    looked: list[float] = []
    monkeypatch.setattr(watchdog, "_over", clock)
    monkeypatch.setattr(watchdog, "_look", lambda: looked.append(clock.now))
    watchdog._watch()
    assert len(looked) == looks


def test_a_thread_that_gets_on_while_it_is_looked_at_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = Watchdog(tmp_path, World(0, 1, 0, torch.device("cpu")), 10.0, Ending())
    watchdog.at(1, "forward")
    (tmp_path / "beats").mkdir()
    armed: list[object] = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: armed.append(_))
    watchdog._beat()
    # Only who watches has stacks dumped later, and takes it back: a dump while other code runs may
    # be the end of the process.
    assert not armed
    beat = watchdog._read(0)

    def compare() -> tuple[list, list]:
        watchdog.at(1, "backward")
        return [beat], [0]

    monkeypatch.setattr(watchdog, "_compare", compare)
    monkeypatch.setattr(watchdog, "_limit_of_silence", lambda _: -1.0)
    assert watchdog._look() is None
    monkeypatch.setattr(watchdog, "_compare", lambda: ([beat], [0]))
    report = watchdog._look()
    assert report is not None
    assert "rank 0 hangs" in report
