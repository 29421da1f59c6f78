"""What a run shows of its experts, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from train.model.balance import Load
from train.monitor import experts
from train.monitor.metrics import Recorder

LOADS = {
    1: Load([6, 2, 0, 0], {"aux_loss": 1.5}, None),
    3: Load([3, 3, 3, 3, 3, 3], {"aux_loss": 1.0, "z_loss": 2.0}, 0.25),
}


def test_numbers_of_a_step() -> None:
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    wanted = {
        "busiest": 3.0,
        "entropy": entropy,
        "unused": 2.0,
        "bias_range": 0.25,
        "aux_loss": 1.25,
        "z_loss": 2.0,
    }
    assert experts.scalars(LOADS, each=False) == pytest.approx(wanted)
    each = experts.scalars(LOADS, each=True)
    assert each["busiest/block_1"] == 3.0
    assert each["entropy/block_3"] == pytest.approx(1.0)
    assert "bias_range/block_1" not in each
    assert len(each) == len(wanted) + 3 * 2 + 1 + 2 + 1


@pytest.mark.parametrize("counts", [[0, 0, 0], [7]])
def test_no_token_or_one_expert_is_no_fault(counts: list[int]) -> None:
    loads = {0: Load(counts, {}, None)}
    told = experts.scalars(loads, each=True)
    assert all(math.isfinite(value) for value in told.values())
    assert experts.figure(loads) is not None
    assert experts.scalars({}, each=True) == {}


def test_an_expert_dies_once_until_it_lives_again() -> None:
    follows, said = experts.Experts(), {}
    for step in range(1, 3 * experts.DEAD_AFTER):
        alive = step == experts.DEAD_AFTER + 50
        loads = {2: Load([5, int(alive), 0], {}, None), 4: Load([0, 0], {}, None)}
        if line := follows.died(loads):
            said[step] = line
    assert said == {
        100: "experts without a token for 100 steps: block 2: 1, 2",
        250: "experts without a token for 100 steps: block 2: 1",
    }


def test_many_dead_are_one_short_line() -> None:
    follows = experts.Experts()
    loads = {block: Load([1] + [0] * 511, {}, None) for block in (0, 1)}
    lines = [follows.died(loads) for _ in range(experts.DEAD_AFTER)]
    assert set(lines[:-1]) == {None}
    assert lines[-1] is not None
    assert "block 0: 1, 2, 3, 4, 5, 6, 7, 8 and 503 more; block 1: 1, 2" in lines[-1]


@pytest.mark.parametrize("sizes", [(48, 512), (1, 1), (3, 4096), (200, 2)])
def test_a_heat_map_of_any_size_fits_its_figure(sizes: tuple[int, int]) -> None:
    layers, count = sizes
    loads = {block: Load([block] * count, {}, None) for block in range(layers)}
    drawn = experts.figure(loads)
    drawn.draw_without_rendering()
    whole = drawn.bbox
    for axes in drawn.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= whole.x0
        assert box.y0 >= whole.y0
        assert box.x1 <= whole.x1
        assert box.y1 <= whole.y1


def test_a_run_shows_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder(tmp_path, 0, 200)
    for step in range(1, 102):
        recorder.loads(LOADS, step, drawn=step == 101)
    recorder.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("experts/busiest")) == 101
    assert [point.step for point in board.Scalars("experts/unused/block_1")] == [101]
    assert board.Tags()["images"] == ["experts/load"]
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log.count("step 100: experts without a token for 100 steps: block 1: 2, 3") == 1
