"""`show` says where each sequence lies, and draws it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.__main__ import main
from parallel.planning.layout import Topology
from parallel.planning.plan import plan
from parallel.simulation import show


def test_every_sequence_is_listed_with_its_owners() -> None:
    made = plan([4000, 0, 100, 50], Topology(4, 2))
    lines = show.text(made).splitlines()
    listed = [line for line in lines if " tokens  " in line and "of the work" in line]
    assert len(listed) == 4
    long = next(line for line in listed if " 4000 tokens" in line)
    assert "ring" in long
    assert any("nobody (empty)" in line for line in listed)


@pytest.mark.parametrize("strategy", ["balanced", "ring", "even", "allgather"])
def test_every_strategy_is_shown(strategy: str, tmp_path: Path) -> None:
    made = plan([700, 300, 20, 1], Topology(5, 2), strategy)  # type: ignore[arg-type]
    assert f"strategy {strategy}" in show.text(made)
    show.draw(made, str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_batch_is_shown() -> None:
    assert "0 sequences, 0 tokens" in show.text(plan([], Topology(3, 2)))


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["parallel", "show", "--ranks", "4", "--lengths", "900,100,50"])
    assert main() == 0
    assert "3 sequences, 1050 tokens, on 4 ranks" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["parallel", "show", "--ranks", "0"])
    assert main() == 2
