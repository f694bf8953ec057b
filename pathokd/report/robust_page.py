"""The robustness report: figures beside the tables, and one page that needs nothing else to be read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from pathokd.evaluate.robustness import Robustness
from pathokd.files import atomic_path, write_text
from pathokd.report import plots_models, plots_pairs, plots_probes, plots_space
from pathokd.report.robust_words import EXPLAINED, KEYS, headlines, key_rows, pick, verdict
from pathokd.report.style import colours, png, svg

TEMPLATE = "robustness.html"


class Shown(NamedTuple):
    """One figure."""

    name: str
    title: str
    how: str
    """How to read it."""
    made: Figure


def write_page(result: Robustness, out: str | Path) -> list[str]:
    """Write OUT/report.html and every figure as OUT/figures/NAME.png and .svg.

    Args:
        result: From `measure_robustness`.
        out: Folder.

    Returns:
        Names of the figures.

    Raises:
        StoreError: A file cannot be written.
    """
    folder, sections = Path(out), figures(result)
    drawn: list[dict[str, object]] = []
    for section, shown in sections.items():
        for number, one in enumerate(shown):
            text = svg(one.made)
            for suffix, content in ((".svg", _standalone(text).encode()), (".png", png(one.made))):
                with atomic_path(folder / "figures" / f"{one.name}{suffix}") as part:
                    part.write_bytes(content)
            heading = section if number == 0 else ""
            drawn.append(
                {"section": heading, "title": one.title, "how": one.how, "svg": Markup(text), "name": one.name}
            )
    write_text(folder / "report.html", render(result, drawn))
    names = [one.name for shown in sections.values() for one in shown]
    for old in (folder / "figures").glob("*.svg"):  # of an earlier page; a picture by itself is none of ours
        if old.stem not in names and (picture := old.with_suffix(".png")).is_file():
            old.unlink()
            picture.unlink()
    return names


def render(result: Robustness, drawn: list[dict[str, object]]) -> str:
    """The page as HTML.

    Args:
        result: From `measure_robustness`.
        drawn: Figures as dicts with section, title, how, svg and name.
    """
    loader = jinja2.PackageLoader("pathokd.report", "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template.filters["number"] = _number
    names = list(result.models["name"])
    measures, keys = result.tables["measures"], key_rows(result)
    shown = {row["name"] for row in keys}
    return template.get_template(TEMPLATE).render(
        facts=result.facts,
        models=result.models.to_dict("records"),
        colours=colours(names),
        headlines=headlines(result),
        verdict=verdict(result),
        title=_title(names),
        keys=keys,
        explained=[words for name, words in EXPLAINED.items() if name in shown],
        figures=drawn,
        not_shown=result.not_shown.to_dict("records"),
        measures=measures.astype(object).where(measures.notna(), None).to_dict("records"),
        groups=result.tables["groups"].to_dict("records"),
    )


def figures(result: Robustness) -> dict[str, list[Shown]]:
    """Every figure the tables allow, by section."""
    t, models = result.tables, list(result.models["name"])
    measures = t["measures"]
    some: dict[str, list[Shown]] = {}

    def add(section: str, name: str, title: str, how: str, there: bool, make: Callable[[], Figure]) -> None:
        if there:
            some.setdefault(section, []).append(Shown(name, title, how, make()))

    fixed = int(result.facts["settings"]["neighbour_k"])
    wanted = {(key.name, key.group): key for key in KEYS}
    oriented = _oriented(t["differences"], fixed)
    add(
        "Better or worse than " + models[0], "differences", "Difference from " + models[0],
        "Each model minus the reference on the same tiles and the same resamples. Signs are turned so that right is "
        "better; an interval that crosses the line may be chance.",
        len(oriented) > 0,
        lambda: plots_models.forest(oriented, {key: each.words for key, each in wanted.items()}, models[0]),
    )  # fmt: skip
    points, x_words = _against(result, fixed)
    add(
        "Better or worse than " + models[0] if len(oriented) else "Accuracy and robustness", "accuracy_robustness",
        "Accuracy against robustness",
        "Up knows more about tissue, right withstands more. The area of a marker grows with the number of parameters.",
        len(points) > 0, lambda: plots_models.accuracy_against_robustness(points, x_words),
    )  # fmt: skip
    found = "Is the same tissue found again?"
    paired = len(t["pairs"]) > 0
    add(
        found, "topk", "Top-k by what differs",
        "For each tile, is the same place under the other condition among its k nearest, of all tiles of both? It "
        f"falls as more tiles are searched: here {result.facts['n_places']:,} places.",
        paired and _has(measures, "topk_mean", ("cross-scanner", "cross-staining", "both")),
        lambda: plots_pairs.topk_by_group(measures, models),
    )  # fmt: skip
    tops = [str(name) for name in dict.fromkeys(t["pairs"]["metric"]) if str(name).startswith("top")] if paired else []
    top = "top10" if "top10" in tops else max(tops, key=lambda name: int(name[3:]), default="")
    add(
        found, "heatmap_topk", f"{top.replace('top', 'Top-')}, condition by condition",
        "Rows ask, columns are searched. A dark row or column is a condition that the model does not carry over.",
        paired, lambda: plots_pairs.heatmaps(t["pairs"], top, models, result.tiles.conditions),
    )  # fmt: skip
    add(
        found, "heatmap_cosine", "Cosine, condition by condition",
        "Read it beside the top-k: a model that gives every tile the same features has a perfect cosine.",
        paired, lambda: plots_pairs.heatmaps(t["pairs"], "cosine", models, result.tiles.conditions),
    )  # fmt: skip
    group = _first(t["distribution"], "group", ("cross-scanner", "cross-staining", "all"))
    add(
        found, "distribution", "Distribution of the paired cosine",
        "All tiles, not only their mean. The shaded tail holds the 5 % of places that change most.",
        bool(group), lambda: plots_pairs.distribution(t["distribution"], group, models),
    )  # fmt: skip
    read = result.tiles.read
    if read is not None:
        add(
            found, "strips", "One place under every condition",
            "Places drawn at random. Beneath each tile: the cosine to the first column, by model.",
            len(t["strips"]) > 0, lambda: plots_pairs.strips(t["strips"], models, read),
        )  # fmt: skip
    near = "Who is near: the same tissue or the same condition?"
    add(
        near, "robustness_index", "Robustness index against k",
        "Among near tiles of other cases that share either the tissue or the scanner with a tile, the share that has "
        "the tissue. 1 is all tissue, 0 all scanner; the dotted line is where tiles drawn at random lie, which depends "
        "on how many classes and scanners there are. Towards large k every model ends there.",
        _has(measures, "robustness_index"), lambda: plots_space.index_by_k(measures, models),
    )  # fmt: skip
    for confounder in dict.fromkeys(t["ranks"]["confounder"]) if len(t["ranks"]) else []:
        add(
            near, f"ranks_{confounder}", f"Neighbours by rank, {'staining' if confounder == 'stain' else confounder}",
            "What the first, second, ... neighbour of a tile is, tiles of its own case left out.",
            True, partial(plots_space.neighbours_by_rank, t["ranks"], confounder, models),
        )  # fmt: skip
    add(
        near, "projection", "Two principal axes, coloured twice",
        "The same points by condition and by tissue. Clouds that follow the upper colouring are bound to the scanner. "
        "Two axes hold only part of the variance, so this is a picture and no measure.",
        bool(plots_space.coloured_by(t["projection"])), lambda: plots_space.projection(t["projection"], models),
    )  # fmt: skip
    probe = "Does a probe carry over?"
    add(
        probe, "predictability", "What features give away",
        "A linear probe that guesses the condition from the features of tissue it has not seen.",
        bool(measures["name"].str.endswith("_predictability").any()),
        lambda: plots_probes.predictability(measures, models),
    )  # fmt: skip
    for condition in dict.fromkeys(t["transfer"]["condition"]) if len(t["transfer"]) else []:
        add(
            probe, f"transfer_{condition}", f"A tissue probe across {condition}s",
            f"Filled: trained under the {condition} it is tested under, on other cases. Hollow: trained under another; "
            "of several the mean, without interval.",
            True, partial(plots_probes.transfer, t["transfer"], condition, models),
        )  # fmt: skip
    add(
        probe, "confounding", "Average performance drop under rising confounding",
        "Probes trained on tiles in which the scanner goes with the tissue more and more, tested on balanced ones. A "
        "robust model stays flat.",
        len(t["confounding"]) > 0, lambda: plots_probes.confounding(t["confounding"], models),
    )  # fmt: skip
    bears = "What else does it bear?"
    for what, how in (
        ("accuracy", "Accuracy of a probe trained on clean tiles."),
        ("cosine", "Cosine to the clean tile."),
    ):
        add(
            bears, f"severity_{what}", f"Severity of simulated changes: {what}", how + " 0 is the tile as it is.",
            len(t["severity"]) > 0, partial(plots_probes.severity, t["severity"], what, models),
        )  # fmt: skip
    add(
        bears, "turns", "Turned and flipped",
        "Tissue has no up: a tile and its turned copy should be each other's nearest.",
        _has(measures, "turn_cosine"), lambda: plots_probes.turns(measures, models),
    )  # fmt: skip
    return some


def _title(names: list[str]) -> str:
    """The question, whatever the number of models."""
    if len(names) == 1:
        return f"How robust is {names[0]}?"
    return f"How robust are {', '.join(names[:-1])} and {names[-1]}?"


def _has(measures: pd.DataFrame, name: str, groups: tuple[str, ...] = ()) -> bool:
    rows = measures[measures["name"] == name]
    return len(rows) > 0 and (not groups or bool(rows["group"].isin(groups).any()))


def _first(table: pd.DataFrame, column: str, wanted: tuple[str, ...]) -> str:
    """The first of the wanted values that the column holds, or nothing."""
    held = set(table[column]) if len(table) else set()
    return next((value for value in wanted if value in held), "")


def _oriented(differences: pd.DataFrame, fixed_k: int) -> pd.DataFrame:
    """Differences of key numbers, signs turned so that more is better."""
    frames = []
    for key in KEYS:
        rows = pick(differences, key, fixed_k)
        if not key.better or rows.empty or rows["low"].isna().all():
            continue
        if key.better == "lower":
            rows = rows.assign(value=-rows["value"], low=-rows["high"], high=-rows["low"])
        frames.append(rows)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["name", "group", "model"])


def _against(result: Robustness, fixed_k: int) -> tuple[pd.DataFrame, str]:
    """Probe accuracy and robustness of each model that has both."""
    measures = result.tables["measures"]
    by = {(key.name, key.group): key for key in KEYS}
    for x_key, y_group in (
        (("topk_mean", "cross-scanner"), "same scanner"),
        (("robustness_index", "site"), "same site"),
        (("robustness_index", "scanner"), "same scanner"),
    ):
        x = pick(measures, by[x_key], fixed_k)
        y = measures[(measures["name"] == "probe_accuracy") & (measures["group"] == y_group)]
        if len(x) and len(y):
            both = x.merge(y, on="model", suffixes=("_x", "_y")).merge(result.models, left_on="model", right_on="name")
            columns = {"value_x": "x", "low_x": "x_low", "high_x": "x_high", "value_y": "y", "low_y": "y_low"}
            table = both.rename(columns={**columns, "high_y": "y_high"})
            return table[["model", "params", "x", "x_low", "x_high", "y", "y_low", "y_high"]], by[x_key].words
    return pd.DataFrame(), ""


def _number(value: float | None, digits: int = 3) -> str:
    """Three decimals with a true minus; a dash for what is not a number."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def _standalone(text: str) -> str:
    """The SVG as a file of its own: variables become colours again."""
    plain = text.replace("var(--ink)", "#1b2733").replace("var(--faint)", "#7b8794")
    return plain.replace("<svg ", '<svg font-family="sans-serif" ', 1)
