"""Figures of a run. matplotlib is imported when the first one is drawn.

Margins of what is drawn while a run trains are given, not found: to find them matplotlib lays
out every text twice more, which takes longer than to draw.
"""

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

    drawn = Figure(figsize=(6, 3.6))
    axes = drawn.subplots(gridspec_kw={"left": 0.12, "right": 0.97, "bottom": 0.16, "top": 0.95})
    octaves = {int(first).bit_length() for line in lines.values() for first in line}
    for name, line in lines.items():
        axes.plot(
            [int(first).bit_length() for first in line], list(line.values()), "o-", label=name
        )
    ticks = range(min(octaves), max(octaves) + 1, -(-len(octaves) // 11))
    axes.set_xticks(ticks, [_short(1 << octave >> 1) for octave in ticks])
    axes.set(xlabel=f"{what}, from", ylabel=height)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def _short(number: int) -> str:
    """A power of two as it is spoken of: 512, 4 K, 1 M."""
    for unit, name in ((1 << 20, " M"), (1 << 10, " K")):
        if number >= unit:
            return f"{number / unit:g}{name}"
    return str(number)


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

    parts = list(next(iter(bars.values())))
    beside = 0.7 + 0.085 * max(map(len, parts))  # inches that the legend takes
    width = 1.0 + 0.9 * len(bars) + beside
    margins = {"left": 0.75 / width, "right": 1 - beside / width, "bottom": 0.08, "top": 0.96}
    drawn = Figure(figsize=(width, 4.2))
    axes = drawn.subplots(gridspec_kw=margins)
    at, below = np.arange(len(bars)), np.zeros(len(bars))
    for part in parts:
        heights = np.array([bar[part] for bar in bars.values()])
        axes.bar(at, heights, 0.7, below, label=part)
        below += heights
    if limit is not None:
        axes.axhline(limit, color="black", linestyle="--")
    axes.set_xticks(at, list(bars))
    axes.set(ylabel=height)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
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


def heat(values: np.ndarray, rows: Sequence[Any], column: str, row: str, what: str) -> Any:
    """A heat map as a matplotlib figure, for any number of rows and columns.

    Args:
        values: (rows, columns), 1 in white, 0 in full blue, 2 and above in full red; NaN is empty.
        rows: their names. Columns are numbered from 0.
        column, row, what: what columns, rows and values are.
    """
    from matplotlib.figure import Figure

    count, across = values.shape
    width, height = min(16.0, 5.0 + 0.02 * across), min(16.0, 1.4 + 0.25 * count)
    margins = {"left": 0.8 / width, "right": 1 - 1.1 / width}
    margins |= {"bottom": 0.6 / height, "top": 1 - 0.2 / height}
    drawn = Figure(figsize=(width, height))
    axes = drawn.subplots(gridspec_kw=margins)
    image = axes.imshow(values, vmin=0, vmax=2, cmap="bwr", aspect="auto")
    places = range(0, count, -(-count // 30))
    axes.set_yticks(places, [str(rows[place]) for place in places])
    axes.set_xticks(range(0, across, -(-across // 16)))
    axes.set(xlabel=column, ylabel=row)
    tall = margins["top"] - margins["bottom"]
    beside = drawn.add_axes((1 - 0.9 / width, margins["bottom"], 0.15 / width, tall))
    drawn.colorbar(image, cax=beside, label=what, extend="max")
    return drawn
