"""Figures that set models side by side: differences from a reference, accuracy against robustness."""

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from pathokd.report.plot_parts import dots, fitted, legend, named, offset
from pathokd.report.style import INK, colours, figure, markers, styled


def forest(differences: pd.DataFrame, wanted: Mapping[tuple[str, str], str], reference: str) -> Figure:
    """Each model minus the reference, with the interval of the paired difference.

    Args:
        differences: `differences.csv`, with one k per name and group.
        wanted: (name, group) to what it is called; those whose higher values are worse are marked by a leading `-`.
        reference: Name of the reference.
    """
    with styled():
        models = list(dict.fromkeys(differences["model"]))
        keys = [key for key in wanted if ((differences["name"] == key[0]) & (differences["group"] == key[1])).any()]
        made = figure(7.4, 0.9 + len(keys) * (0.17 + 0.1 * len(models)))
        ax = made.subplots()
        colour, marker = colours([reference, *models]), markers([reference, *models])
        for line, key in enumerate(keys):
            for number, model in enumerate(models):
                part = differences[
                    (differences["name"] == key[0]) & (differences["group"] == key[1]) & (differences["model"] == model)
                ]
                y = line + offset(number, len(models))
                dots(
                    ax, part, [y] * len(part), color=colour[model], marker=marker[model], ms=5, elinewidth=1.6,
                    label=named(model) if line == 0 else None,
                )  # fmt: skip
        ax.axvline(0, color=INK, lw=1)
        ax.set_yticks(range(len(keys)), [wanted[key].lstrip("-") for key in keys])
        ax.invert_yaxis()
        ax.grid(axis="x")
        ax.set_xlabel(fitted(f"difference from {reference} (95 % interval); right is better", 4.6))
        legend(made, ax)
        return made


def accuracy_against_robustness(table: pd.DataFrame, x_label: str) -> Figure:
    """One marker per model, its area growing with the number of parameters, named below: models lie close together.

    Args:
        table: model, params (NaN if unknown), x, x_low, x_high, y, y_low, y_high.
        x_label: What x is.
    """
    with styled():
        made = figure(5.4, 3.6)
        ax = made.subplots()
        colour, marker = colours(list(table["model"])), markers(list(table["model"]))
        for row in table.to_dict("records"):
            name, x, y = row["model"], row["x"], row["y"]
            params = row["params"]
            size = 60.0 if pd.isna(params) else 14 * math.sqrt(max(params, 1e5) / 1e5)
            xerr = [[max(0, x - row["x_low"])], [max(0, row["x_high"] - x)]]
            yerr = [[max(0, y - row["y_low"])], [max(0, row["y_high"] - y)]]
            ax.errorbar(x, y, xerr=xerr, yerr=yerr, color=colour[name], lw=0, elinewidth=1, alpha=0.8)
            ax.scatter(x, y, s=size, color=colour[name], marker=marker[name], alpha=0.75, lw=0)
            note = name if pd.isna(params) else f"{name}, {params / 1e6:.3g} M"
            if len(table) == 1:
                ax.annotate(note, (x, y), xytext=(9, 7), textcoords="offset points", fontsize=9)
            ax.plot([], [], color=colour[name], marker=marker[name], ms=6, lw=0, label=named(note))
        ax.grid()
        ax.margins(0.18)
        ax.set(xlabel=x_label, ylabel="tissue probe, balanced accuracy")
        legend(made, ax)
        return made
