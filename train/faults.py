"""Steps that went wrong: noticed by every rank alike, undone, and kept to be looked at.

A step is bad if its loss or its gradient norm is not finite, or if its loss is
`faults.spike` times the median of the steps before. Its weights are given up: the run goes
back to its last checkpoint, makes the steps since then again, and passes over the batches
of the bad step. `faults/step-….npz` in the run's folder holds them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.settings import ConfigError, setting

if TYPE_CHECKING:
    from data import Batch

FAULTS = "faults"  # their folder in the run's
_WINDOW, _ENOUGH = 64, 16  # losses that a spike is compared with, at most and at least


@dataclass
class FaultsConfig:
    action: Literal["roll back", "stop"] = setting(
        "roll back", "after a bad step: go back to the last checkpoint and skip it, or end the run"
    )
    spike: float = setting(0.0, "a loss of so many times the recent median is bad; 0: any is good")
    most: int = setting(5, "bad steps after one checkpoint that end the run")

    def __post_init__(self) -> None:
        if self.spike and self.spike <= 1:
            raise ConfigError(f"faults.spike is {self.spike}; it must be above 1, or 0 for never")
        if self.most < 1:
            raise ConfigError(f"faults.most is {self.most}; it must be at least 1")


class Judge:
    """Remembers the losses of good steps, and the bad ones since a checkpoint."""

    def __init__(self, config: FaultsConfig) -> None:
        self.config = config
        self.skipped: set[int] = set()  # the number in the stream of each batch to pass over
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._count, self._since = 0, -1

    def fault(self, row: dict[str, float]) -> str | None:
        """What is wrong with a step, by its row of metrics; None if nothing."""
        loss, norm = row["loss"], row["grad_norm"]
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

    def skip(self, batches: Sequence[Batch], step: int) -> bool:
        """Pass over these batches from now on; false if that has happened too often.

        Args:
            step: of the checkpoint that the run goes back to.
        """
        self._count = self._count + 1 if step == self._since else 1
        self._since = step
        self.skipped |= {batch.cursor.batches for batch in batches}
        self._losses.clear()
        return self._count <= self.config.most


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
    np.savez(path, **arrays)
    return path
