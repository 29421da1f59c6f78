"""Steps that went wrong: noticed by every rank alike before they change a weight, and kept.

A step is bad if its loss or its gradient norm is not finite, or if its loss is
`faults.spike` times the median of the steps before. Weights and optimiser stay as they
were, to the last bit, and then, by `faults.action`:

    skip        the step is made again with the batches after the bad ones
    roll back   the run goes back to its last checkpoint, makes the steps since then again,
                and passes over the bad batches: for spikes, which weights lead to
    stop        the run ends

`faults/step-….npz` in the run's folder holds the batches, for `python -m train replay`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.settings import ConfigError, setting

if TYPE_CHECKING:
    from data import Batch

FAULTS = "faults"  # their folder in the run's
_WINDOW, _ENOUGH = 64, 16  # losses that a spike is compared with, at most and at least


@dataclass
class FaultsConfig:
    action: Literal["skip", "roll back", "stop"] = setting(
        "skip",
        "after a bad step: make it with the next batches, go back to the last checkpoint and "
        "pass over its batches, or end the run",
    )
    spike: float = setting(
        0.0, "a loss of so many times the recent median is bad; 0: any is good", least=0
    )
    most: int = setting(
        5, "bad steps in a row, or after one checkpoint, that the run survives", least=0
    )
    hang_seconds: float = setting(
        300.0,
        "without progress after which a rank hangs: it is named, with every rank's stack, and "
        "the run ends with exit code 70, to be started again; 0 for never",
        least=0,
        most=1e7,
    )

    def __post_init__(self) -> None:
        if self.spike and self.spike <= 1:
            raise ConfigError(f"faults.spike is {self.spike}; it must be above 1, or 0 for never")
        if 0 < self.hang_seconds < 1:
            raise ConfigError(
                f"faults.hang_seconds is {self.hang_seconds}; it must be at least 1, or 0 for never"
            )


class Judge:
    """Remembers the losses of good steps, and the bad ones since a checkpoint."""

    def __init__(self, config: FaultsConfig) -> None:
        self.config = config
        self.skipped: set[int] = set()  # the number in the stream of each batch to pass over
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._count, self._since = 0, -1

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, by its loss and gradient norm; None if nothing."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(norm):
            return f"its gradient norm is {norm}"
        if self.config.spike and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            if loss > self.config.spike * usual:
                return f"its loss is {loss:.3f}, the median before it {usual:.3f}"
        self._losses.append(loss)
        return None

    def pass_over(self, batches: Sequence[Batch], step: int) -> bool:
        """Leave these batches out from now on; false if that has happened too often.

        Args:
            step: that the run goes on from; only bad steps after the same one are counted.
        """
        self._count = self._count + 1 if step == self._since else 1
        self._since = step
        self.skipped |= {batch.cursor.batches for batch in batches}
        return self._count <= self.config.most

    def state(self, after: int) -> dict[str, Any]:
        """What a run that goes on must know to judge its steps as this one would.

        Args:
            after: number of the last batch that was trained on; none before it comes again.
        """
        return {
            "losses": list(self._losses),
            "skipped": sorted(number for number in self.skipped if number > after),
            "count": self._count,
            "since": self._since,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which may be empty."""
        self.go_back(state)
        self.skipped = set(state.get("skipped", ()))
        self._count, self._since = state.get("count", 0), state.get("since", -1)

    def go_back(self, state: dict[str, Any]) -> None:
        """The losses as they were then: steps since then will be made again."""
        self._losses = deque(state.get("losses", ()), maxlen=_WINDOW)


def keep(folder: Path, step: int, batches: Sequence[Batch], skipped: set[int]) -> Path:
    """Write the batches of a bad step: `tokens_i`, `labels_i`, `cu_seqlens_i` of each.

    Args:
        folder: the run's.
        skipped: the numbers of the batches that had been passed over until then.
    """
    import numpy as np

    path = folder / FAULTS / f"step-{step:08d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{name}_{i}": getattr(batch, name)
        for i, batch in enumerate(batches)
        for name in ("tokens", "labels", "cu_seqlens")
    }
    arrays["skipped"] = np.array(sorted(skipped), dtype=np.int64)
    part = path.with_suffix(".part.npz")
    part.unlink(missing_ok=True)  # it may be a link
    np.savez(part, **arrays)
    part.replace(path)
    return path
