"""Is a model robust to scanner, staining and site: every measure the tiles allow, for any number of models.

The result is tables, one row per number with n and an interval, and a list of what is not shown and why. Nothing here
draws or writes a report; `pathokd.report.robustness` does.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import sklearn
import torch

from pathokd._version import __version__
from pathokd.errors import ManifestError, StoreError
from pathokd.evaluate.bootstrap import percentiles
from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import PairedSet
from pathokd.evaluate.projection import projections, strips
from pathokd.evaluate.resampling import Measure, Resampler
from pathokd.evaluate.robust_neighbours import MAX_TILES, measure_neighbours
from pathokd.evaluate.robust_neighbours import Settings as NeighbourSettings
from pathokd.evaluate.robust_probes import measure_probes
from pathokd.evaluate.robust_retrieval import measure_retrieval
from pathokd.evaluate.robust_views import measure_views
from pathokd.files import BROKEN_ARRAY
from pathokd.metrics.aggregate import Compat
from pathokd.metrics.paired import TOP_K
from pathokd.types import IntArray

TABLES = (
    "measures",
    "differences",
    "pairs",
    "groups",
    "distribution",
    "ranks",
    "confounding",
    "transfer",
    "severity",
    "projection",
    "strips",
)


@dataclass(frozen=True)
class RobustnessSpec:
    """What is measured, and how.

    Args:
        k: Nearest tiles that count as found.
        n_tiles: Places that take part in retrieval, drawn by `seed`; None takes all. Top-k falls as it grows.
        neighbour_k: k of the robustness index.
        turn_tiles: Tiles turned and flipped; 0 leaves this out.
        severity_tiles: Tiles changed by every simulated factor; 0 leaves this out.
        compat: `plism` rounds as the published benchmark does.
        thorough: Clusters and confounding with the published searches and repetitions.
        seed: Of folds, subsets and resampling.
        device: Where matrices of pairs are multiplied: `cpu`, `cuda` or `mps`.
    """

    k: tuple[int, ...] = TOP_K
    n_tiles: int | None = None
    neighbour_k: int = 11
    turn_tiles: int = 128
    severity_tiles: int = 0
    compat: Compat = None
    thorough: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or self.neighbour_k < 1:
            raise ValueError(f"k should be 1 or more, got {self.k} and {self.neighbour_k}.")
        if len(set(self.k)) < len(self.k):
            raise ValueError(f"each k should be named once, got {list(self.k)}.")
        if min(self.seed, self.turn_tiles, self.severity_tiles) < 0:
            raise ValueError(
                "seed, turn_tiles and severity_tiles must not be negative, got "
                f"{self.seed}, {self.turn_tiles} and {self.severity_tiles}."
            )
        if self.n_tiles is not None and self.n_tiles < 2:
            raise ValueError(f"n_tiles should be 2 or more, got {self.n_tiles}.")


class Robustness(NamedTuple):
    """All that was measured."""

    tables: dict[str, pd.DataFrame]
    """By the names in `TABLES`; a table that could not be made is empty."""
    models: pd.DataFrame
    """name, params (NaN if unknown), dim, in the order given."""
    not_shown: pd.DataFrame
    """model, what, why."""
    facts: dict[str, Any]
    """Settings, counts and versions."""
    tiles: PairedSet


def measure_robustness(
    models: Sequence[ModelFeatures],
    tiles: PairedSet,
    out: str | Path,
    spec: RobustnessSpec = RobustnessSpec(),
    *,
    indices: Mapping[str, IntArray] | None = None,
    overwrite: bool = False,
) -> Robustness:
    """Measure models on one set of tiles. The first model is the reference of differences.

    Args:
        models: Features of the same set.
        tiles: The set.
        out: Folder; finished pairs are kept in its `cache`.
        spec: What and how.
        indices: Published subsets of places by name, for the leaderboard number at each.
        overwrite: Compute again what is kept.

    Returns:
        The tables.

    Raises:
        ValueError: Two models of one name, k larger than the gallery, or a subset that does not fit.
        StoreError: Features are missing, zero or not finite.
        ManifestError: The tiles allow not one measure.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"models should have different names, got {', '.join(names)}: write them as NAME=MODEL.")
    index, n_places = None, len(tiles.places)
    if tiles.registered:
        index = _subset(n_places, spec)
        n = n_places if index is None else len(index)
        if max(spec.k) > 2 * n - 1:
            raise ValueError(
                f"k = {max(spec.k)} is larger than the gallery of {2 * n - 1} tiles ({n} places): lower it."
            )
    rows = [_one_model(model, tiles, Path(out), spec, index, indices or {}, overwrite) for model in models]
    by_name = list(zip(names, rows, strict=True))
    tables = {name: _stacked([(model, row[name]) for model, row in by_name]) for name in TABLES}
    if tables["measures"].empty:
        what, why = rows[0]["_not_shown"][0]
        raise ManifestError(
            f"Nothing can be measured on {tiles.source}; {what}, to begin with: {why}. Add registered tiles "
            "(pair_id), or tiles with a label from two sites."
        )
    tables["differences"] = _differences({model: row["_measures"] for model, row in by_name})
    reasons = [(model, pd.DataFrame(row["_not_shown"], columns=["what", "why"])) for model, row in by_name]
    not_shown = _stacked(reasons)
    facts = _facts(tiles, spec, index, names[0])
    table = pd.DataFrame({"name": names, "params": [m.params for m in models], "dim": [_dim(m) for m in models]})
    return Robustness(tables, table, _once(not_shown, len(models)), facts, tiles)


def _one_model(
    model: ModelFeatures,
    tiles: PairedSet,
    out: Path,
    spec: RobustnessSpec,
    index: IntArray | None,
    indices: Mapping[str, IntArray],
    overwrite: bool,
) -> dict[str, Any]:
    measures: list[Measure] = []
    not_shown: list[tuple[str, str]] = []
    found: dict[str, Any] = {name: pd.DataFrame() for name in TABLES}
    if tiles.registered:
        units = tiles.column(tiles.unit_column(), tiles.rows[next(iter(tiles.conditions))])
        subsets = {"": index, **{f"index {name}": rows for name, rows in indices.items()}}
        for name, rows in subsets.items():
            resampler = Resampler(units if rows is None else units[rows], spec.seed)
            retrieval = measure_retrieval(
                model,
                tiles,
                resampler,
                out / "cache",
                k=spec.k,
                index=rows,
                compat=spec.compat,
                device=spec.device,
                overwrite=overwrite,
            )
            if not name:
                measures += retrieval.measures
                not_shown += retrieval.not_shown
                found.update(pairs=retrieval.pairs, groups=retrieval.groups, distribution=retrieval.distribution)
            else:
                measures += [m._replace(group=name) for m in retrieval.measures if m.name == "plism"]
        found["strips"] = strips(model, tiles, spec.seed)
    else:
        whats = "cosine, separation and top-k of registered pairs"
        not_shown.append((whats, "the tiles are not registered: no column pair_id names places seen twice"))
    for part in (
        measure_neighbours(model, tiles, _neighbour_settings(spec)),
        measure_probes(model, tiles, spec.seed),
        measure_views(model, tiles, turn_tiles=spec.turn_tiles, severity_tiles=spec.severity_tiles, seed=spec.seed),
    ):
        measures += part.measures
        not_shown += part.not_shown
        found.update({name: getattr(part, name) for name in part._fields if name in TABLES and name != "measures"})
    found["projection"] = projections(model, tiles, spec.seed)
    found["measures"] = pd.DataFrame([_row(measure) for measure in measures])
    return {**found, "_measures": measures, "_not_shown": not_shown}


def _neighbour_settings(spec: RobustnessSpec) -> NeighbourSettings:
    if spec.thorough:
        return NeighbourSettings.published(spec.neighbour_k, spec.seed)
    return NeighbourSettings(k=spec.neighbour_k, seed=spec.seed)


def _subset(n_places: int, spec: RobustnessSpec) -> npt.NDArray[np.int64] | None:
    if spec.n_tiles is None or spec.n_tiles == n_places:
        return None
    if spec.n_tiles > n_places:
        raise ValueError(f"n_tiles = {spec.n_tiles}, but only {n_places} places are seen under every condition.")
    return np.sort(np.random.default_rng(spec.seed).permutation(n_places)[: spec.n_tiles])


def read_index(path: str | Path, tiles: PairedSet) -> npt.NDArray[np.int64]:
    """A published subset: a `.npy` file of whole numbers, positions of places sorted by (x, y).

    Of tiles without x and y, positions in the order of the set.

    Raises:
        StoreError: The file is missing, its numbers do not fit the places of the set, or the set is not whole: each
            place left out would shift all positions after it.
    """
    try:
        index = np.load(path, allow_pickle=False)
    except BROKEN_ARRAY as error:
        raise StoreError(f"{path} should be a .npy file of positions of places: {error}.") from error
    n = len(tiles.places)
    whole = index.ndim == 1 and np.issubdtype(index.dtype, np.integer) and len(index) > 1
    if not whole or index.min() < 0 or index.max() >= n or len(np.unique(index)) < len(index):
        raise StoreError(f"{path} should list positions of places, each 0 to {n - 1} and at most once.")
    if tiles.notes:
        raise StoreError(
            f"{path} counts the places of a whole set, and of {tiles.source} some are left out ({tiles.notes[0]} It "
            "would pick others): complete the set, or leave out --index."
        )
    found: npt.NDArray[np.int64] = index.astype(np.int64)
    if {"x", "y"} <= set(tiles.frame):
        at = tiles.frame.iloc[tiles.rows[next(iter(tiles.conditions))]]
        found = np.lexsort((at["y"], at["x"]))[found]
    return found


def _row(measure: Measure) -> dict[str, object]:
    low, high = measure.interval
    return {
        "name": measure.name,
        "group": measure.group,
        "k": measure.k,
        "value": measure.value,
        "low": low,
        "high": high,
        "n": measure.n,
        "n_groups": measure.n_groups,
    }


def _differences(measures: Mapping[str, Sequence[Measure]]) -> pd.DataFrame:
    """Model minus reference, with the interval of the paired draws."""
    reference, *others = measures
    base = {(m.name, m.group, m.k): m for m in measures[reference]}
    rows = []
    for name in others:
        for m in measures[name]:
            r = base.get((m.name, m.group, m.k))
            if r is None or m.draws is None or r.draws is None or m.draws.shape != r.draws.shape:
                continue
            low, high = percentiles(m.draws - r.draws, m.n_groups)
            rows.append(
                {**_row(m), "model": name, "reference": reference, "value": m.value - r.value, "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def _stacked(frames: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """Tables of several models, with a first column that names them."""
    named = [frame.assign(model=name) for name, frame in frames if len(frame)]
    if not named:
        return pd.DataFrame()
    table = pd.concat(named, ignore_index=True)
    return table[["model", *(name for name in table if name != "model")]]


def _once(not_shown: pd.DataFrame, n_models: int) -> pd.DataFrame:
    """What holds for every model alike is said once."""
    if not_shown.empty:
        return pd.DataFrame(columns=["model", "what", "why"])
    count = not_shown.groupby(["what", "why"])["model"].transform("nunique")
    named = not_shown.assign(model=not_shown["model"].where(count < n_models, "all models"))
    return named.drop_duplicates(ignore_index=True)


def _dim(model: ModelFeatures) -> int:
    return int(model.load(np.zeros(1, dtype=np.int64)).shape[1])


def _thinned(labelled: int) -> list[str]:
    """What a reader who compares with a published robustness index must know."""
    if labelled <= MAX_TILES:
        return []
    return [
        f"Neighbours are looked up among about {MAX_TILES:,} of {labelled:,} labelled tiles, whole places drawn by the "
        "seed: at the same k the robustness index is not that of all tiles."
    ]


def _facts(tiles: PairedSet, spec: RobustnessSpec, index: IntArray | None, reference: str) -> dict[str, Any]:
    frame = tiles.frame
    return {
        "tiles": tiles.source,
        "n_tiles": len(tiles),
        "n_places": len(tiles.places) if index is None else len(index),
        "conditions": list(tiles.conditions),
        "scanners": sorted(frame["scanner"].unique()) if "scanner" in frame else [],
        "stainings": sorted(frame["stain"].unique()) if "stain" in frame else [],
        "sites": sorted(set(tiles.column("site", tiles.known("site")).tolist())) if "site" in frame else [],
        "classes": sorted(frame["label"].iloc[tiles.labelled()].unique()) if "label" in frame else [],
        "resampled": tiles.unit_column(),
        "kept_apart": tiles.apart_column(),
        "reference": reference,
        "notes": [*tiles.notes, *_thinned(len(tiles.labelled()))],
        "settings": asdict(spec),
        "tiles_fingerprint": tiles.fingerprint,
        "versions": {
            "pathokd": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
