"""Figures of probes and of changed tiles: what features give away, what carries over, what is withstood."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pathokd.report.plot_parts import dots, legend, lines, named, offset, word
from pathokd.report.style import INK, colours, figure, grid, markers, styled


def predictability(measures: pd.DataFrame, models: Sequence[str]) -> Figure:
    """How well a linear probe tells scanner, staining or site, beside chance.

    Args:
        measures: `measures.csv`.
        models: In order.
    """
    with styled():
        table = measures[measures["name"].str.endswith("_predictability")]
        names = list(dict.fromkeys(table["name"]))
        made = figure(6.4, 0.7 + len(names) * (0.25 + 0.2 * len(models)))
        ax = made.subplots()
        colour, marker = colours(models), markers(models)
        for line, name in enumerate(names):
            chance = measures[(measures["name"] == "chance") & (measures["group"] == name)]["value"].iloc[0]
            ax.plot([chance, chance], [line - 0.42, line + 0.42], color=INK, lw=1.2, ls=":")
            if line == 0:
                ax.text(chance, line - 0.44, "chance", ha="center", va="bottom", fontsize=8)
            for number, model in enumerate(models):
                part = table[(table["name"] == name) & (table["model"] == model)]
                y = line + offset(number, len(models))
                dots(
                    ax, part, [y] * len(part), color=colour[model], marker=marker[model], ms=6, elinewidth=1.6,
                    label=named(model) if line == 0 else None,
                )  # fmt: skip
        ax.set_yticks(range(len(names)), [word(name.removesuffix("_predictability")) for name in names])
        ax.set(xlim=(0, 1.03), ylim=(len(names) - 0.4, -0.7), xlabel="balanced accuracy of a probe; left is robust")
        ax.grid(axis="x")
        legend(made, ax)
        return made


def transfer(table: pd.DataFrame, condition: str, models: Sequence[str]) -> Figure:
    """Accuracy and calibration error of a tissue probe under each scanner, trained under the same or another.

    Args:
        table: `transfer.csv`.
        condition: `scanner` or `site`.
        models: In order.
    """
    with styled():
        table = table[table["condition"] == condition]
        tests = sorted(table["test"].unique())
        made, axes = grid(1, 2, 4.1, 2.9)
        colour, marker = colours(models), markers(models)
        for ax, what, low, high, title in (
            (axes[0][0], "accuracy", "low", "high", "balanced accuracy"),
            (axes[0][1], "ece", "ece_low", "ece_high", "calibration error (ECE); low is good"),
        ):
            for number, model in enumerate(models):
                part = table[table["model"] == model]
                for home in (True, False):
                    cells = part[(part["train"] == part["test"]) == home].groupby("test")
                    some = cells[[what, low, high]].mean()
                    # The mean of several intervals is not the interval of their mean.
                    some.loc[cells.size() > 1, [low, high]] = np.nan
                    x = np.array([tests.index(t) for t in some.index]) + offset(number, len(models), 0.16)
                    ends = np.stack([some[what] - some[low], some[high] - some[what]]).clip(0)
                    ax.errorbar(
                        x + (0.0 if home else min(0.06, 0.3 / len(models))),
                        some[what],
                        yerr=ends,
                        color=colour[model],
                        marker=marker[model],
                        mfc=colour[model] if home else "none",
                        ms=6,
                        lw=0,
                        elinewidth=1,
                        label=f"{named(model)}, {'same' if home else 'other'} {condition}",
                    )
            ax.set_xticks(range(len(tests)), tests)
            ax.set_xlim(-0.6, len(tests) - 0.4)
            ax.set_title(title, loc="left")
            ax.set_xlabel(f"tested under this {condition}")
            ax.grid(axis="y")
        legend(made, axes[0][0], min(3, len(models)))
        return made


def confounding(table: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Accuracy of a probe as class and scanner go together more and more in its training tiles.

    Args:
        table: `confounding.csv`.
        models: In order.
    """
    with styled():
        confounders = list(dict.fromkeys(table["confounder"]))
        made, axes = grid(1, len(confounders), 3.9, 2.8)
        for ax, confounder in zip(axes[0], confounders, strict=True):
            lines(ax, table[table["confounder"] == confounder], "cramers_v", models, "accuracy")
            ax.set_title(f"tissue tied to {word(confounder)}", loc="left")
            ax.set_xlabel("Cramér's V in training: 0 balanced, 1 tied")
        axes[0][0].set_ylabel("accuracy on balanced tiles")
        legend(made, axes[0][0])
        return made


def severity(table: pd.DataFrame, what: str, models: Sequence[str]) -> Figure:
    """Curves over severity, one small panel per simulated change, models overlaid.

    Args:
        table: `severity.csv`.
        what: `accuracy` (with its interval) or `cosine` (to the clean tile).
        models: In order.
    """
    with styled():
        changes = [change for change in dict.fromkeys(table["change"]) if change != "clean"]
        columns = min(6, len(changes))
        rows = -(-len(changes) // columns)
        made, axes = grid(rows, columns, 1.65, 1.45)
        flat = [ax for row in axes for ax in row]
        clean = table[table["change"] == "clean"]
        # Intervals whole, too: one cut off at the axis looks narrower than it is.
        bottom = float(np.nanmin(table[["low", "accuracy"] if what == "accuracy" else [what]])) - 0.08
        bottom = max(-0.05, bottom) if what == "accuracy" else bottom
        for ax, change in zip(flat, changes, strict=False):
            part = pd.concat([clean, table[table["change"] == change]])
            if what == "cosine":
                part = part.assign(low=np.nan, high=np.nan)
            lines(ax, part, "severity", models, what)
            ax.set_title(change, loc="left", fontsize=8.5)
            ax.set(xlim=(-0.05, 1.05), ylim=(bottom, 1.02), xticks=[0, 0.5, 1])
            ax.tick_params(labelsize=7)
        for ax in flat[max(0, len(changes) - columns) : len(changes)]:
            ax.set_xlabel("severity", fontsize=8)
        for ax in flat[len(changes) :]:
            ax.set_visible(False)
        legend(made, flat[0], len(models))
        return made


def turns(measures: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Cosine and top-1 between upright and turned tiles.

    Args:
        measures: `measures.csv`.
        models: In order.
    """
    with styled():
        made, axes = grid(1, 2, 4.0, 2.9)
        colour, marker = colours(models), markers(models)
        for ax, name, title in ((axes[0][0], "turn_cosine", "cosine"), (axes[0][1], "turn_top1", "top-1")):
            table = measures[(measures["name"] == name) & (measures["group"] != "all turns")]
            groups = list(dict.fromkeys(table["group"]))
            for number, model in enumerate(models):
                part = table[table["model"] == model]
                if part.empty:
                    continue  # stored features cannot be turned
                y = np.array([groups.index(g) for g in part["group"]]) + offset(number, len(models), 0.2)
                dots(ax, part, y, color=colour[model], marker=marker[model], ms=5, elinewidth=1.2, label=named(model))
            ax.set_yticks(range(len(groups)), groups if ax is axes[0][0] else [""] * len(groups))
            ax.invert_yaxis()
            lowest = float(np.nanmin(table[["low", "value"]]))  # one group has no interval
            ax.set_xlim(right=1 + 0.03 * (1 - lowest) + 1e-3)
            ax.grid(axis="x")
            ax.set_title(f"{title} of a tile with its turned copy", loc="left")
        legend(made, axes[0][1])
        return made
