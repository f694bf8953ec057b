"""What several figures share: lines over a column with their intervals, legends, words."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathokd.report.style import LINES, colours, grid, markers
from pathokd.types import FloatArray

LETTER = 0.07
"""Width of a letter of 8 points, inches."""
LINE = 0.17
"""Height of a line of a legend or title, inches."""
ACROSS = 3
"""Panels beside each other where there are more than four: in one row their letters would be too small to read."""


def word(column: str) -> str:
    """What a column is called in prose."""
    return {"stain": "staining", "label": "tissue"}.get(column, column)


def lines(ax: Axes, table: pd.DataFrame, x: str, models: Sequence[str], y: str = "value") -> None:
    """One line per model over `x`, with bars for intervals."""
    colour, marker = colours(models), markers(models)
    values = sorted(table[x].unique())
    step = min(np.diff(values), default=1.0)
    for number, model in enumerate(models):
        part = table[table["model"] == model].sort_values(x)
        if part.empty:
            continue
        shift = 0.08 * step * (number - (len(models) - 1) / 2) if len(values) < 12 else 0.0
        ax.errorbar(
            part[x].to_numpy(float) + shift,
            part[y],
            yerr=bars(part, y),
            color=colour[model],
            marker=marker[model],
            ms=4,
            lw=1.5,
            ls=LINES[number % len(LINES)],
            capsize=0,
            elinewidth=1,
            label=named(model),
        )
    ax.grid(axis="y")


def named(name: str) -> str:
    """A name as a label: matplotlib leaves labels that begin with an underscore out of its legends."""
    return f" {name}" if name.startswith("_") else name


def offset(number: int, count: int, step: float = 0.22) -> float:
    """How far from its row the mark of one of `count` models lies: never so far that it reaches the next row."""
    return min(step, 0.8 / count) * (number - (count - 1) / 2)


def dots(ax: Axes, part: pd.DataFrame, y: Sequence[float] | FloatArray, **how: Any) -> None:
    """Values as markers at heights `y`, with bars for intervals; `how` as matplotlib's `errorbar`."""
    ax.errorbar(part["value"], y, xerr=bars(part), lw=0, **how)


def bars(part: pd.DataFrame, y: str = "value") -> FloatArray:
    """Lengths of error bars below and above, (2, n): 0 where there is no interval."""
    lengths: FloatArray = np.nan_to_num(
        np.stack([part[y] - part["low"], part["high"] - part[y]]).clip(0).astype(np.float64)
    )
    return lengths


def legend(made: Figure, ax: Axes, columns: int = 4) -> None:
    """The lines of one panel, named below the figure, in as many columns as the names leave room for."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        fitting = int(made.get_size_inches()[0] / (0.5 + LETTER * max(map(len, labels))))
        columns = max(1, min(columns, fitting, len(labels)))
        lines = -(-len(labels) // columns)
        made.set_figheight(made.get_figheight() + LINE * (lines - 1))  # the panels keep their height
        made.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def fitted(text: str, inches: float, letter: float = LETTER) -> str:
    """A text in as many lines as a width takes."""
    return "\n".join(textwrap.wrap(text, max(8, int(inches / letter)))) or text


def short(names: Sequence[str], letters: int) -> dict[str, str]:
    """Names without their middle, where they have more than so many letters; whole if two would then be alike."""
    tail = (letters - 1) // 2
    cut = {n: n if len(n) <= letters else f"{n[: letters - 1 - tail]}\u2026{n[-tail:]}" for n in names}
    return cut if len({*cut.values()}) == len(cut) else {name: name for name in names}


def panels(
    models: Sequence[str], width: float, height: float, each: int = 1, inner: float | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a column of `each` panels per model, titled by it: of many models, several rows of such columns.

    Args:
        models: In order.
        width: Of a panel with its labels, inches.
        height: The same.
        each: Panels of a model.
        inner: Inches that a title may take, where that is less than the panel.

    Returns:
        The figure, and each model's axes from top to bottom.
    """
    across = beside(len(models))
    titles = [fitted(model, width - 0.4 if inner is None else inner, 0.1) for model in models]
    blocks = -(-len(models) // across)
    made, axes = grid(blocks * each, across, width, height)
    made.set_figheight(made.get_figheight() + blocks * LINE * max(title.count("\n") for title in titles))
    for spare in range(len(models), blocks * across):
        for row in range(each):
            axes[spare // across * each + row][spare % across].set_visible(False)
    columns = [
        [axes[number // across * each + row][number % across] for row in range(each)] for number in range(len(models))
    ]
    for column, title in zip(columns, titles, strict=True):
        column[0].set_title(title, loc="left", weight="bold")
    return made, columns


def beside(count: int) -> int:
    """How many of so many panels stand in one row."""
    return count if count <= ACROSS + 1 else ACROSS
