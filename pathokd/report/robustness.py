"""Robustness as CSV and JSON for programs, back from them, and as a table for a terminal."""

import json
from pathlib import Path

import pandas as pd

from pathokd.errors import StoreError
from pathokd.evaluate.paired_set import PairedSet
from pathokd.evaluate.robustness import TABLES, Robustness
from pathokd.files import atomic_path, write_json
from pathokd.report.terminal import ModelTable

SHOWN = ("cosine_mean", "separation_mean", "topk_mean", "plism", "robustness_index")
"""Measures in the terminal; the files hold all of them."""
_TEXT = (
    "name", "model", "reference", "group", "metric", "first", "second", "scanner", "stain", "label", "confounder",
    "type", "pair_id", "condition", "train", "test", "change", "what", "why",
)  # fmt: skip
"""Columns that stay text: a model may be called 1, and a scanner NA."""


def write_robustness(result: Robustness, out: str | Path) -> None:
    """Write every table that is not empty as OUT/NAME.csv, and measures, differences and facts as robustness.json."""
    folder = Path(out)
    for name, table in {**result.tables, "models": result.models, "not_shown": result.not_shown}.items():
        if len(table):
            with atomic_path(folder / f"{name}.csv") as part:
                table.to_csv(part, index=False)
        else:  # what an earlier run with other settings left would be read as part of this one
            (folder / f"{name}.csv").unlink(missing_ok=True)
    kept = {name: _records(result.tables[name]) for name in ("measures", "differences")}
    others = {"models": _records(result.models), "not_shown": _records(result.not_shown)}
    write_json(folder / "robustness.json", {"facts": result.facts, **kept, **others})


def read_robustness(out: str | Path, tiles: PairedSet) -> Robustness:
    """Read what `write_robustness` wrote, to draw from it again.

    Args:
        out: The folder.
        tiles: The set that was measured.

    Raises:
        StoreError: The folder holds no result, or that of other tiles.
    """
    folder = Path(out)
    try:
        facts = json.loads((folder / "robustness.json").read_text(encoding="utf-8"))["facts"]
        found = {
            name: _read(path) if (path := folder / f"{name}.csv").is_file() else pd.DataFrame()
            for name in (*TABLES, "models", "not_shown")
        }
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder} holds no result of `pathokd robustness` ({error}): run it first.") from error
    if facts["tiles_fingerprint"] != tiles.fingerprint:
        raise StoreError(f"{folder} was measured on {facts['tiles']}, which differs from {tiles.source}: open that.")
    models, not_shown = found.pop("models"), found.pop("not_shown")
    return Robustness(found, models, not_shown, facts, tiles)


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), keep_default_na=False, na_values=[""])


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    """Rows as JSON has them: what is not a number is null."""
    records: list[dict[str, object]] = json.loads(table.to_json(orient="records"))
    return records


def robustness_table(result: Robustness) -> ModelTable:
    """Models as columns, one line per measure, value and interval; n in the caption."""
    measures = result.tables["measures"]
    measures = measures[measures["name"].isin(SHOWN)]
    facts = result.facts
    other_k = (measures["name"] == "robustness_index") & (measures["k"] != facts["settings"]["neighbour_k"])
    measures = measures[~other_k]
    counts = f"{facts['n_places']} places, {facts['n_tiles']} tiles"
    names = list(result.models["name"])
    labels = (
        measures["name"] + measures["k"].map(lambda k: "" if pd.isna(k) else f" k={k:g}") + ", " + measures["group"]
    )
    rows = []
    for label, part in measures.groupby(labels, sort=False):
        by_model = part.set_index("model")
        rows.append((str(label), [_cell(by_model, model) for model in names]))
    return ModelTable(names, rows, f"{counts}; 95 % intervals by resampling {facts['resampled']}.")


def _cell(rows: pd.DataFrame, model: str) -> str:
    if model not in rows.index:
        return "-"
    row = rows.loc[model]
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
