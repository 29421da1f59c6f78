"""Figures of a run. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def curves(lines: Mapping[str, Mapping[str, float]], what: str, height: str) -> Any:
    """Curves over octaves as one matplotlib figure.

    Args:
        lines: by their name, {first number of an octave: value}.
        what: the numbers are; height: the values are.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 3.6), layout="constrained")
    axes = drawn.subplots()
    for name, line in lines.items():
        axes.plot([max(int(first), 0.5) for first in line], list(line.values()), "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"{what}, from", ylabel=height)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def stacked(
    bars: Mapping[str, Mapping[str, float]], height: str, limit: float | None = None
) -> Any:
    """Bars of stacked parts as a matplotlib figure.

    Args:
        bars: by their name, the height of each part by its name; all bars have the same parts.
        height: what the heights are.
        limit: drawn as a dashed line.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2.6 + 0.9 * len(bars), 4.2), layout="constrained")
    axes = drawn.subplots()
    at, below = np.arange(len(bars)), np.zeros(len(bars))
    for part in next(iter(bars.values())):
        heights = np.array([bar[part] for bar in bars.values()])
        axes.bar(at, heights, 0.7, below, label=part)
        below += heights
    if limit is not None:
        axes.axhline(limit, color="black", linestyle="--")
    axes.set_xticks(at, list(bars))
    axes.set(ylabel=height)
    drawn.legend(loc="outside right upper")
    return drawn


def grid(
    values: np.ndarray, rows: Sequence[Any], columns: Sequence[Any], row: str, column: str
) -> Any:
    """Shares in [0, 1], (rows, columns), as a coloured matplotlib figure; NaN stays empty."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1.6 + 0.8 * len(columns), 1.4 + 0.45 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), [str(name) for name in columns])
    axes.set_yticks(range(len(rows)), [str(name) for name in rows])
    axes.set(xlabel=column, ylabel=row)
    for (at_row, at_column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(at_column, at_row, f"{value:.0%}", ha="center", va="center")
    return drawn
