"""What a robustness report says in words: the verdict, the key numbers and their names."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from pathokd.evaluate.robustness import Robustness

COLLAPSED = 0.05
"""A separation below this is no better than collapse, whatever the cosine."""


class Key(NamedTuple):
    """A number of the summary."""

    name: str
    group: str
    words: str
    better: Literal["higher", "lower", ""] = "higher"
    """Empty: not to be judged by itself, as collapse makes it perfect."""
    k: int | None = None
    """Which k, where there are several; None takes the largest up to 10."""


KEYS = (
    Key("topk_mean", "cross-scanner", "top-10 across scanners", k=10),
    Key("topk_mean", "cross-staining", "top-10 across stainings", k=10),
    Key("topk_mean", "both", "top-10 across both", k=10),
    Key("separation_mean", "cross-scanner", "separation across scanners"),
    Key("separation_mean", "cross-staining", "separation across stainings"),
    Key("cosine_mean", "cross-scanner", "cosine across scanners", ""),
    Key("plism", "all", "PLISM number"),
    Key("robustness_index", "scanner", "robustness index, scanner", k=0),
    Key("robustness_index", "stain", "robustness index, staining", k=0),
    Key("robustness_index", "site", "robustness index, site", k=0),
    Key("croma_median", "scanner", "CRoMa median, scanner"),
    Key("croma_median", "site", "CRoMa median, site"),
    Key("clustering_score", "scanner", "clustering score, scanner"),
    Key("scanner_predictability", "scanner", "scanner told by a probe", "lower"),
    Key("stain_predictability", "stain", "staining told by a probe", "lower"),
    Key("site_predictability", "site", "site told by a probe", "lower"),
    Key("probe_accuracy", "same scanner", "tissue probe, same scanner"),
    Key("probe_accuracy", "other scanner", "tissue probe, other scanner"),
    Key("probe_drop", "scanner", "drop under another scanner", "lower"),
    Key("probe_drop", "site", "drop at another site", "lower"),
    Key("probe_ece", "other scanner", "calibration error, other scanner", "lower"),
    Key("apd", "scanner", "APD, scanner"),
    Key("apd", "site", "APD, site"),
    Key("turn_cosine", "all turns", "cosine after turning", ""),
    Key("turn_top1", "all turns", "top-1 after turning"),
)

EXPLAINED = {
    "separation_mean": "Separation: cosine of matched tiles less that of all other pairs; near 0 is collapse.",
    "plism": "PLISM number: mean of four medians over pairs of conditions, the cosine of all pairs and the top-10 of "
    "those across scanners, across stainings and across both.",
    "robustness_index": "Robustness index: among near tiles that share either the tissue or the condition, the share "
    "that has the tissue.",
    "croma_median": "CRoMa: how much nearer the nearest tiles of the same tissue under another condition lie than "
    "those of other tissue under the same, (b - a) / (b + a) of the two distances a and b; below 0 the condition "
    "rules. The median over tiles.",
    "clustering_score": "Clustering score: how well k-means clusters fit the tissue less how well they fit the "
    "condition, adjusted Rand indices; from -1 to 1.",
    "probe_ece": "Calibration error: how far a probe's stated confidence lies from its accuracy.",
    "apd": "APD, average performance drop: what a tissue probe loses where the condition goes with the tissue in its "
    "training, relative to a balanced one; -0.1 is a tenth of the accuracy.",
}
"""What a measure is, by its name; those that say it themselves are left out."""


def pick(table: pd.DataFrame, key: Key, fixed_k: int) -> pd.DataFrame:
    """Rows of a key number, one per model, with one k."""
    if table.empty:
        return table
    rows = table[(table["name"] == key.name) & (table["group"] == key.group)]
    if key.k is None or rows.empty:
        return rows
    wanted = fixed_k if key.k == 0 else key.k
    ks = rows["k"].unique()
    return rows[rows["k"] == (wanted if wanted in ks else ks.max())]


def key_rows(result: Robustness) -> list[dict[str, object]]:
    """The summary table: one row per key number there is, one cell per model.

    Returns:
        Dicts with name, words, better (`higher`, `lower` or empty), n, n_groups, and cells: value, low, high, best,
        sure (1 surely better than the reference, -1 surely worse, 0 neither).
    """
    fixed, names, out = _fixed_k(result), list(result.models["name"]), []
    for key in KEYS:
        rows = pick(result.tables["measures"], key, fixed)
        if rows.empty or rows["value"].isna().all():
            continue
        differences = pick(result.tables["differences"], key, fixed)
        best = {"higher": rows["value"].max(), "lower": rows["value"].min()}.get(key.better)
        first = rows.iloc[0]
        words = key.words if key.k is None else key.words.replace("top-10", f"top-{first['k']:g}")
        out.append(
            {
                "name": key.name,
                "words": words + (f" (k = {first['k']:g})" if key.k == 0 else ""),
                "better": key.better,
                "cells": [_cell(rows, differences, name, key, best) for name in names],
                "n": int(first["n"]),
                "n_groups": int(first["n_groups"]),
            }
        )
    return out


def _cell(
    rows: pd.DataFrame, differences: pd.DataFrame, name: str, key: Key, best: float | None
) -> dict[str, object] | None:
    mine = rows[rows["model"] == name]
    if mine.empty:
        return None
    row, sure = mine.iloc[0], 0
    against = differences[differences["model"] == name] if len(differences) else differences
    if len(against) and key.better:
        sign, d = (1 if key.better == "higher" else -1), against.iloc[0]
        sure = sign * (int(d["low"] > 0) - int(d["high"] < 0))
    is_best = best is not None and len(rows) > 1 and row["value"] == best
    return {"value": row["value"], "low": row["low"], "high": row["high"], "best": is_best, "sure": sure}


def _fixed_k(result: Robustness) -> int:
    return int(result.facts["settings"]["neighbour_k"])


class Sentence(NamedTuple):
    """A sentence of the verdict: the first model's, and what is said of the others."""

    name: str
    group: str
    words: str
    k: int | None = None


SENTENCES = (
    Sentence(
        "topk_mean",
        "cross-scanner",
        "Across scanners, {model} finds a place again among its {k} nearest tiles in {percent} of cases",
        10,
    ),
    Sentence(
        "topk_mean",
        "cross-staining",
        "Across stainings, {model} finds a place again among its {k} nearest tiles in {percent} of cases",
        10,
    ),
    Sentence(
        "robustness_index",
        "site",
        "Where a near neighbour of {model} shares either the tissue or the site, it is the tissue in {percent}{chance}",
        0,
    ),
    Sentence("probe_drop", "scanner", "A tissue probe on {model} loses {points} under a scanner it was not trained on"),
    Sentence("probe_drop", "site", "A tissue probe on {model} loses {points} at a site it was not trained on"),
    Sentence("scanner_predictability", "scanner", "A probe tells the scanner from {model} in {percent}{chance}"),
    Sentence("site_predictability", "site", "A probe tells the site from {model} in {percent}{chance}"),
)
HEADLINES = (
    Key("topk_mean", "cross-scanner", "top-10 across scanners", k=10),
    Key("topk_mean", "cross-staining", "top-10 across stainings", k=10),
    Key("robustness_index", "site", "robustness index against the site", k=0),
    Key("probe_drop", "site", "drop at another site", "lower"),
)
"""What decides who is called more robust: the first that was measured."""


def headlines(result: Robustness) -> list[str]:
    """One sentence per model but the reference: is it more robust, and does it know as much about tissue."""
    differences, reference = result.tables["differences"], result.facts["reference"]
    found = [(key, pick(differences, key, _fixed_k(result))) for key in HEADLINES]
    key, rows = next(((k, r) for k, r in found if len(r)), (HEADLINES[0], pd.DataFrame()))
    said = []
    for row in rows.to_dict("records"):
        sign = 1 if key.better == "higher" else -1
        sure = sign * (int(row["low"] > 0) - int(row["high"] < 0))
        word = {1: "more robust than", -1: "less robust than", 0: "not clearly more or less robust than"}[sure]
        words = key.words.replace("top-10", f"top-{row['k']:g}") if key.k == 10 else key.words
        text = f"{row['model']} is {word} {reference}: {words} {_change(row)}"
        said.append(text + _knows(differences, str(row["model"])) + ".")
    return said


def _knows(differences: pd.DataFrame, model: str) -> str:
    """What it costs in accuracy on tissue, or nothing if that was not measured."""
    rows = differences[
        (differences["name"] == "probe_accuracy")
        & differences["group"].isin(["same scanner", "same site"])
        & (differences["model"] == model)
    ]
    if rows.empty:
        return ""
    row = rows.iloc[0].to_dict()
    word = "knows more" if row["low"] > 0 else "knows less" if row["high"] < 0 else "does not clearly know more or less"
    return f"; it {word} about tissue, probe accuracy {_change(row)}"


def verdict(result: Robustness) -> list[str]:
    """The answer in a few sentences, numbers with 95 % intervals."""
    names, measures, said = list(result.models["name"]), result.tables["measures"], []
    for sentence in SENTENCES:
        rows = pick(measures, Key(sentence.name, sentence.group, "", k=sentence.k), _fixed_k(result))
        if len(rows) and not rows["value"].isna().all():
            said.append("; ".join(_parts(rows, sentence, names, measures)) + ".")
    return [*said, *_warnings(measures, names)]


def _parts(rows: pd.DataFrame, sentence: Sentence, names: Sequence[str], measures: pd.DataFrame) -> list[str]:
    """The sentence for the first model, a short form for the others."""
    parts: list[str] = []
    for row in (
        rows.set_index("model").reindex([n for n in names if n in set(rows["model"])]).reset_index().to_dict("records")
    ):
        about = (row["name"], f"{row['name']} {row['group']}")
        chance = measures[(measures["name"] == "chance") & measures["group"].isin(about)]["value"]
        percent = f"{_percent(row['value'])} ({_percent(row['low'], unit=False)} to {_percent(row['high'])})"
        points = f"{_signed(row['value'], plus=False)} points ({_signed(row['low'])} to {_signed(row['high'])})"
        words = {
            "model": row["model"],
            "k": f"{row['k']:g}" if pd.notna(row["k"]) else "",
            "percent": percent,
            "points": points,
            "chance": f", where chance is {_percent(chance.iloc[0])}" if len(chance) else "",
        }
        short = f"{row['model']} {points if 'points' in sentence.words else percent}"
        parts.append(short if parts else sentence.words.format(**words))
    return parts


def _percent(value: float, *, unit: bool = True) -> str:
    if np.isnan(value):
        return "?"
    digits = 0 if value <= 0.995 or value == 1 else 1
    return f"{100 * value:.{digits}f}" + ("\u00a0%" if unit else "")


def _signed(value: float, *, plus: bool = False) -> str:
    if np.isnan(value):
        return "?"
    return f"{100 * value:{'+' if plus else ''}.1f}".replace("-", "\u2212")


def _change(row: Mapping[Hashable, Any]) -> str:
    """A difference in points with its interval."""
    return f"{_signed(row['value'], plus=True)} points ({_signed(row['low'])} to {_signed(row['high'])})"


def _warnings(measures: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Models whose cosine says nothing."""
    said = []
    rows = measures[(measures["name"] == "separation_mean") & (measures["group"] == "all")]
    for name in names:
        value = rows[rows["model"] == name]["value"]
        if len(value) and float(value.iloc[0]) < COLLAPSED:
            said.append(
                f"Matched tiles of {name} are hardly closer than any two tiles (separation "
                f"{float(value.iloc[0]):.3f}): its features are collapsed or ruled by a common "
                "part, so read no cosine of it as robustness."
            )
    return said
