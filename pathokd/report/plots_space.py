"""Figures of feature space: the robustness index, neighbours by rank, two principal axes."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from pathokd.report.plot_parts import beside, legend, lines, named, panels, word
from pathokd.report.style import FAINT, colours, grid, markers, styled

TYPE_COLOURS = {"SS": "#009E73", "SO": "#56B4E9", "OS": "#D55E00", "OO": "#8C8C8C"}
TYPE_WORDS = {
    "SS": "same tissue, same {}",
    "SO": "same tissue, other {}",
    "OS": "other tissue, same {}",
    "OO": "other tissue, other {}",
}


def index_by_k(measures: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Robustness index against k, one panel per confounder, beside that of neighbours drawn at random.

    Args:
        measures: `measures.csv`.
        models: In order.
    """
    with styled():
        table = measures[measures["name"] == "robustness_index"]
        confounders = list(dict.fromkeys(table["group"]))
        made, axes = grid(1, len(confounders), 3.9, 2.9)
        for ax, confounder in zip(axes[0], confounders, strict=True):
            part = table[table["group"] == confounder]
            lines(ax, part, "k", models)
            ax.set_xscale("log")
            ks = sorted(part["k"].unique())
            shown = [k for k in (1, 3, 11, 33, 101) if k in ks] or ks
            ax.set_xticks(shown, [f"{k:g}" for k in shown])
            ax.minorticks_off()
            is_chance = (measures["name"] == "chance") & (measures["group"] == f"robustness_index {confounder}")
            for chance in measures["value"][is_chance].iloc[:1]:
                ax.axhline(chance, color=FAINT, lw=1, ls=":", label="chance")
            ax.set(ylim=(-0.02, 1.02), xlabel="k nearest neighbours")
            ax.set_title(f"against {word(confounder)}", loc="left")
            ax.text(
                0.98,
                0.97,
                "1 only tissue counts",
                transform=ax.transAxes,
                ha="right",
                va="top",
                fontsize=8,
                color=FAINT,
            )
            ax.text(
                0.98,
                0.03,
                f"0 only {word(confounder)} counts",
                transform=ax.transAxes,
                ha="right",
                fontsize=8,
                color=FAINT,
            )
        axes[0][0].set_ylabel("robustness index")
        legend(made, axes[0][0])
        return made


def neighbours_by_rank(ranks: pd.DataFrame, confounder: str, models: Sequence[str]) -> Figure:
    """What the neighbours are, rank by rank, one panel per model.

    Args:
        ranks: `ranks.csv`.
        confounder: Which.
        models: In order.
    """
    with styled():
        table = ranks[ranks["confounder"] == confounder]
        made, axes = panels(models, 3.0, 2.6)
        across = beside(len(models))
        for number, ((ax,), model) in enumerate(zip(axes, models, strict=True)):
            wide = table[table["model"] == model].pivot_table(index="rank", columns="type", values="share")
            kinds = [kind for kind in TYPE_COLOURS if kind in wide]
            ax.stackplot(
                wide.index,
                [wide[kind] for kind in kinds],
                colors=[TYPE_COLOURS[kind] for kind in kinds],
                labels=[TYPE_WORDS[kind].format(word(confounder)) for kind in kinds],
                lw=0,
            )
            ax.set(xlim=(1, wide.index.max()), ylim=(0, 1), xlabel="rank of neighbour")
            if number % across:
                ax.set_yticklabels([])
            else:
                ax.set_ylabel("share")
        handles, labels = axes[0][0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside lower center", ncols=min(2, len(models)), fontsize=8)
        return made


def coloured_by(table: pd.DataFrame) -> list[str]:
    """Columns of `projection.csv` that points are coloured by: the condition that varies, and the tissue."""
    varying = [name for name in ("scanner", "site", "stain") if name in table and table[name].nunique() > 1]
    return [*varying[:1], *(["label"] if "label" in table else [])]


def projection(table: pd.DataFrame, models: Sequence[str]) -> Figure:
    """Two principal axes, twice: coloured by scanner (or site), and by tissue.

    Args:
        table: `projection.csv`.
        models: In order.
    """
    with styled():
        columns = coloured_by(table)
        made, axes = panels(models, 3.1, 2.9, len(columns))
        across = beside(len(models))
        for row, column in enumerate(columns):
            names = sorted(table[column].astype(str).unique())
            colour, marker = colours(names), markers(names)
            for number, model in enumerate(models):
                ax, part = axes[number][row], table[table["model"] == model]
                for name in names:
                    some = part[part[column].astype(str) == name]
                    ax.scatter(
                        some["pc1"],
                        some["pc2"],
                        s=9,
                        color=colour[name],
                        marker=marker[name],
                        alpha=0.65,
                        lw=0,
                        label=named(name),
                    )
                ax.set(xticks=[], yticks=[])
                if number % across == 0:
                    ax.set_ylabel(f"by {'tissue' if column == 'label' else word(column)}")
                if part.empty:
                    ax.text(0.5, 0.5, "all tiles alike", ha="center", va="center", transform=ax.transAxes, color=FAINT)
                    continue  # a collapsed model has no axes
                share = part[["share1", "share2"]].iloc[0]
                ax.set_xlabel(f"PC 1 ({share['share1']:.0%})   PC 2 ({share['share2']:.0%})", fontsize=8, color=FAINT)
            axes[across - 1][row].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.6)
        return made
