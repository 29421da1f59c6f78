"""How even the experts of a model are, step by step: numbers, a figure, and who died."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from train.model.balance import Load
from train.monitor import figures

DEAD_AFTER = 100  # steps without a token
_NAMED = 8  # experts at most that a line names of a block


class Experts:
    """Follows the loads of a run, from the step that it is made in."""

    def __init__(self) -> None:
        self._idle: dict[int, np.ndarray] = {}  # by block, steps since each expert's last token

    def died(self, loads: Mapping[int, Load]) -> str | None:
        """A line that names the experts that have had no token for `DEAD_AFTER` steps, as of now.

        Call it once a step. Steps without a target count for nothing.
        """
        said = []
        for block, load in loads.items():
            counts = np.asarray(load.counts)
            if not counts.any():
                continue
            idle = np.where(counts > 0, 0, self._idle.get(block, np.zeros_like(counts)) + 1)
            self._idle[block] = idle
            dead = np.flatnonzero(idle == DEAD_AFTER).tolist()
            if dead:
                named = ", ".join(map(str, dead[:_NAMED]))
                more = f" and {len(dead) - _NAMED} more" if len(dead) > _NAMED else ""
                said.append(f"block {block}: {named}{more}")
        return (
            f"experts without a token for {DEAD_AFTER} steps: {'; '.join(said)}" if said else None
        )


def scalars(loads: Mapping[int, Load], each: bool) -> dict[str, float]:
    """What TensorBoard shows of a step, by name.

    `busiest`: tokens of the busiest expert over the mean, 1 where all is even; `entropy` of the
    shares of the load, over its highest value log E; `unused` experts; `bias_range`; and each loss
    without its weight. Of several layers `busiest` and `bias_range` are the highest, `entropy` the
    lowest, `unused` the sum, losses the mean.

    Args:
        each: the same of every block too, as `busiest/block_3`.
    """
    found: dict[str, dict[int, float]] = {}
    for block, load in loads.items():
        for name, value in _layer(load).items():
            found.setdefault(name, {})[block] = value
    together: dict[str, Callable[[list[float]], float]]
    together = {"busiest": max, "bias_range": max, "entropy": min, "unused": sum}
    told: dict[str, float] = {}
    for name, values in found.items():
        over = together.get(name, lambda held: sum(held) / len(held))
        told[name] = float(over(list(values.values())))
        if each:
            told |= {f"{name}/block_{block}": value for block, value in values.items()}
    return told


def _layer(load: Load) -> dict[str, float]:
    counts = np.asarray(load.counts, dtype=np.float64)
    found = dict(load.losses)
    if load.bias_range is not None:
        found["bias_range"] = load.bias_range
    if not counts.any():
        return found
    share = counts / counts.sum()
    used = share[share > 0]
    entropy = -float((used * np.log(used)).sum())
    return found | {
        "busiest": float(share.max() * len(share)),
        "entropy": entropy / np.log(len(share)) if len(share) > 1 else 1.0,
        "unused": float((counts == 0).sum()),
    }


def figure(loads: Mapping[int, Load]) -> Any:
    """Tokens of every expert over the mean of its layer, layers × experts, as a heat map."""
    most = max(len(load.counts) for load in loads.values())
    values = np.full((len(loads), most), np.nan)
    for row, load in zip(values, loads.values(), strict=True):
        counts = np.asarray(load.counts, dtype=np.float64)
        row[: len(counts)] = counts / max(counts.mean(), 1e-30)
    return figures.heat(values, list(loads), "expert", "block", "tokens / mean")
