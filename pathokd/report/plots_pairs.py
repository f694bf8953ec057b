"""Figures of registered pairs: heat maps, top-k, the distribution of cosines, strips of one place."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathokd.metrics.aggregate import Condition
from pathokd.report.plot_parts import LETTER, beside, legend, lines, panels, short
from pathokd.report.style import FAINT, INK, colours, figure, grid, styled
from pathokd.types import FloatArray, Rgb

MAX_CONDITIONS = 8
"""With more conditions, heat maps show scanners, as means over stainings, or stainings where scanners share none."""


def heatmaps(pairs: pd.DataFrame, metric: str, models: Sequence[str], conditions: Mapping[str, Condition]) -> Figure:
    """Condition by condition, one map per model.

    Args:
        pairs: `pairs.csv`.
        metric: `cosine`, or `topK`, whose rows ask and whose columns are searched.
        models: In order.
        conditions: Staining and scanner of each name.
    """
    with styled():
        table = pairs[pairs["metric"] == metric]
        kind, kept = _shown(table, conditions)
        matrices = {model: _matrix(kept[kept["model"] == model]) for model in models}
        size = len(next(iter(matrices.values()))[0])
        side = 1.1 + 0.5 * size
        made, axes = panels(models, side + 0.3, side, inner=0.2 + 0.5 * size)
        across = beside(len(models))
        made.set_layout_engine("compressed")  # for square panels; "constrained" cuts their titles off
        low = min(np.nanmin(values) for _, values in matrices.values())
        for number, (names, values) in enumerate(matrices.values()):
            ax = axes[number][0]
            bottom = min(0.9, max(0.0, math.floor(low * 10) / 10)) if metric == "cosine" else 0.0
            image = ax.imshow(values, vmin=bottom, vmax=1, cmap="cividis")
            _annotate(ax, values, bottom)
            ax.set_xticks(range(size), names, rotation=40, ha="right")
            ax.set_yticks(range(size), names if number % across == 0 else [""] * size)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        bar = made.colorbar(image, ax=[ax for (ax,) in axes], shrink=0.7, pad=0.02)
        bar.outline.set_visible(False)
        axes[0][0].set_ylabel(kind if metric == "cosine" else f"{kind} that asks")
        if metric != "cosine":
            axes[(len(axes) - 1) // across * across][0].set_xlabel("is searched (with its own)")
        return made


def _shown(table: pd.DataFrame, conditions: Mapping[str, Condition]) -> tuple[str, pd.DataFrame]:
    """What rows and columns are, and the pairs by that name; of many conditions those that differ in one thing."""
    ends = table[["first", "second"]]
    if len(np.unique(ends)) <= MAX_CONDITIONS:
        return "condition", table
    for shown, held, kind in (("scanner", "stain", "scanner"), ("stain", "scanner", "staining")):
        held_by, shown_by = ({name: getattr(c, which) for name, c in conditions.items()} for which in (held, shown))
        same = ends["first"].map(held_by) == ends["second"].map(held_by)
        if same.any():
            kept = table[same].copy()
            for end in ends:
                kept[end] = kept[end].map(shown_by)
            return f"{kind} (mean over {'stainings' if kind == 'scanner' else 'scanners'})", kept
    return "condition", table


def _matrix(table: pd.DataFrame) -> tuple[list[str], FloatArray]:
    """Names and values; the diagonal is empty."""
    labels = list(dict.fromkeys([*table["first"], *table["second"]]))
    total, count = np.zeros((2, len(labels), len(labels)))
    for first, second, forth, back in table[["first", "second", "first_to_second", "second_to_first"]].itertuples(
        index=False
    ):
        a, b = labels.index(first), labels.index(second)
        total[a, b] += forth
        total[b, a] += back
        count[a, b] += 1
        count[b, a] += 1
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return labels, mean


def _annotate(ax: Axes, values: FloatArray, bottom: float) -> None:
    if len(values) > 10:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            bright = (value - bottom) / (1 - bottom) > 0.55
            ink = "#101418" if bright else "#ffffff"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)


def topk_by_group(measures: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Top-k over k, one panel per group of pairs, with 95 % intervals.

    Args:
        measures: `measures.csv`.
        models: In order.
    """
    with styled():
        table = measures[measures["name"] == "topk_mean"]
        groups = [g for g in ("cross-scanner", "cross-staining", "both") if (table["group"] == g).any()]
        made, axes = grid(1, len(groups), 3.0, 2.7)
        for ax, group in zip(axes[0], groups, strict=True):
            lines(ax, table[table["group"] == group], "k", models)
            n = int(table["n"].iloc[0])
            ks = sorted(table["k"].unique())
            ax.plot(ks, [k / (2 * n - 1) for k in ks], color=FAINT, lw=1, ls=":", label="chance")
            ax.set_title({"both": "across both"}.get(group, group), loc="left")
            ax.set(ylim=(0, 1.02), xlabel="k", xticks=ks)
        axes[0][0].set_ylabel("found among the k nearest")
        legend(made, axes[0][0])
        return made


def distribution(table: pd.DataFrame, group: str, models: Sequence[str]) -> Figure:
    """How paired cosines are spread, with the lowest 5 % shaded.

    Args:
        table: `distribution.csv`.
        group: Of pairs.
        models: In order.
    """
    with styled():
        table = table[table["group"] == group]
        made, axes = grid(len(models), 1, 6.4, 1.25)
        colour = colours(models)
        left = float(table["low"].min())
        for row, model in enumerate(models):
            ax, part = axes[row][0], table[table["model"] == model]
            share, tail = part["count"] / part["count"].sum(), float(part["tail"].iloc[0])
            ax.bar(part["low"], share, width=0.005, align="edge", color=colour[model], lw=0)
            start, words = max(-1.0, left - 0.06), f"lowest 5 %, below {tail:.2f}"
            if tail < 1:
                ax.axvspan(-1, tail, color="#D55E00", alpha=0.18, lw=0)
                ax.axvline(tail, color="#D55E00", lw=1)
            else:  # the tail lies within the last bar: shaded, it would be all there is
                words = f"more than 95 % above {tail - 0.005:.3f}    "
            ax.text(
                tail,
                0.97,
                f"  {words}  ",
                transform=ax.get_xaxis_transform(),
                va="top",
                ha="right" if tail - start > 0.4 * (1 - start) else "left",
                fontsize=8,
            )
            ax.set_title(model, loc="left", fontsize=9)
            ax.set(xlim=(start, 1.005), yticks=[])
            ax.spines["left"].set_visible(False)
            if row < len(models) - 1:
                ax.set_xticklabels([])
        axes[-1][0].set_xlabel(f"cosine of one place under two conditions ({group})")
        return made


def strips(table: pd.DataFrame, models: Sequence[str], read: Callable[[int], Rgb]) -> Figure:
    """Some places under every condition, with each model's cosine to the first condition beneath.

    Args:
        table: `strips.csv`.
        models: In order.
        read: Gives the tile of a row.
    """
    with styled():
        first = table[table["model"] == models[0]]
        places, conditions = list(dict.fromkeys(first["pair_id"])), list(dict.fromkeys(first["condition"]))[:8]
        lines, called = 0.17 * len(models), short(models, 24)
        words = max(map(len, called.values())) + 6 if len(models) > 1 else 0  # a name and its cosine
        made = figure(max(1.25, LETTER * words) * len(conditions) + 0.1, (1.28 + lines) * len(places) + 0.25)
        axes = made.subplots(len(places), len(conditions), squeeze=False)
        made.get_layout_engine().set(h_pad=0.05, rect=(0, 0, 1, 0.985))  # type: ignore[union-attr, call-arg]
        for row, place in enumerate(places):
            for column, condition in enumerate(conditions):
                ax = axes[row][column]
                here = table[(table["pair_id"] == place) & (table["condition"] == condition)]
                ax.imshow(read(int(here["row"].iloc[0])), interpolation="antialiased")
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set_visible(False)
                if row == 0:
                    ax.set_title(condition, fontsize=9)
                if column == 0:
                    continue
                for line, model in enumerate(models):
                    cosine = float(here[here["model"] == model]["cosine"].iloc[0])
                    text = f"{cosine:.2f}" if len(models) == 1 else f"{called[model]} {cosine:.2f}"
                    ax.text(
                        0.5, -0.04 - 0.12 * line, text, transform=ax.transAxes, ha="center", va="top", fontsize=7.5,
                        color=INK,
                    )  # fmt: skip
        return made
