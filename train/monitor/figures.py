"""Figures of an evaluation. matplotlib is imported when the first one is drawn."""

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
