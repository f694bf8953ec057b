"""What a linear probe makes of features: does it know the scanner, does it carry over to another, is it calibrated."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pathokd.evaluate.bootstrap import percentiles
from pathokd.evaluate.paired_features import Features, ModelFeatures
from pathokd.evaluate.paired_set import PairedSet, Rows
from pathokd.evaluate.probes import Labels, balanced_accuracy, choose_c, fit_logistic
from pathokd.evaluate.resampling import Draws, Measure, Resampler, ratio
from pathokd.metrics.calibration import calibration_error
from pathokd.types import FloatArray

FOLDS = 5
MAX_TILES = 1500
"""Tiles a probe is trained and tested on; more are thinned out by place, seeded."""
BINS = 15


class Probed(NamedTuple):
    """Probes of one model."""

    measures: list[Measure]
    transfer: pd.DataFrame
    """One row per training and test condition: train, test, accuracy, low, high, ece, ece_low, ece_high, n."""
    not_shown: list[tuple[str, str]]


def measure_probes(model: ModelFeatures, tiles: PairedSet, seed: int = 0) -> Probed:
    """Predictability of scanner, staining and site; transfer and calibration of a tissue probe between them.

    Args:
        model: Features of the set.
        tiles: The set.
        seed: Of folds, thinning and resampling.

    Returns:
        Measures and the table of transfers.
    """
    measures, frames, not_shown = [], [], []
    for name in ("scanner", "stain", "site"):
        if not tiles.varies(name):
            if name != "site" or not tiles.registered:
                not_shown.append((f"{name} predictability", f"the tiles have one {name} only, or no such column"))
            continue
        try:
            measures += _predictability(model, tiles, name, seed)
        except ValueError as error:
            not_shown.append((f"{name} predictability", str(error)))
    for name in ("scanner", "site"):
        if not tiles.varies(name):
            continue
        try:
            found, frame = _transfer(model, tiles, name, seed)
            measures += found
            frames.append(frame)
        except ValueError as error:
            not_shown.append((f"tissue probe across {name}s, calibration", str(error)))
    return Probed(measures, pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), not_shown)


def thin(tiles: PairedSet, rows: Rows, at_most: int, seed: int) -> Rows:
    """At most about `at_most` rows, whole places at a time."""
    if len(rows) <= at_most:
        return rows
    places = tiles.column("pair_id" if tiles.registered else "key", rows)
    names = np.random.default_rng(seed).permutation(np.unique(places))
    return rows[np.isin(places, names[: max(2, int(len(names) * at_most / len(rows)))])]


def _predictability(model: ModelFeatures, tiles: PairedSet, name: str, seed: int) -> list[Measure]:
    of_places = tiles.registered and name != "site"
    # Of places seen under every condition, or tissue would tell: a case that B never scanned is known not to be of B.
    # But a case comes from one site: a probe that had seen the case would know its site by that.
    every = np.sort(np.concatenate(list(tiles.rows.values()))) if of_places else None
    rows = thin(tiles, tiles.known(name, every), MAX_TILES, seed)
    y = tiles.column(name, rows)
    apart = "pair_id" if of_places else tiles.apart_column()
    groups = tiles.column(apart, rows)
    x = model.load(rows)
    predicted = y.copy()
    for train, test in _folds(groups):
        unseen = np.setdiff1d(y[test], y[train])  # no probe can know them, and would look robust for it
        if len(unseen) or len(np.unique(y[train])) < 2:
            whose = f"{name} {unseen[0]}" if len(unseen) else f"each {name}"
            raise ValueError(f"too few {apart}s to hold some out of {whose}")
        predicted[test] = fit(x[train], y[train], groups[train], seed).predict(x[test])
    resampler = Resampler(tiles.column(tiles.unit_column(), rows), seed)
    draws = accuracy_draws(y, predicted, resampler)
    value, chance = balanced_accuracy(y, predicted), 1 / len(np.unique(y))
    label = f"{name}_predictability"
    return [
        Measure(label, name, value, len(y), resampler.n_groups, draws),
        Measure("chance", label, chance, len(y), resampler.n_groups, None, low=chance, high=chance),
    ]


def _folds(groups: Labels) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    count = min(FOLDS, len(np.unique(groups)))
    if count < 2:
        raise ValueError("a probe holds groups out and needs two of them")
    return list(GroupKFold(count).split(groups, groups=groups))


def fit(x: Features, y: Labels, groups: Labels, seed: int) -> Pipeline:
    """Logistic regression on standardised features, C by grouped cross-validation on the same tiles."""
    scaled = StandardScaler().fit(x)
    train = scaled.transform(x)
    return make_pipeline(scaled, fit_logistic(train, y, choose_c(train, y, groups, seed)))


def accuracy_draws(truth: Labels, predicted: Labels, resampler: Resampler) -> Draws:
    """Balanced accuracy under every draw; a class that a draw misses does not count in it. NaN if it misses all."""
    classes, label = np.unique(truth, return_inverse=True)
    one_hot = np.eye(len(classes))[label]
    right, total = resampler.sums(one_hot * (truth == predicted)[:, None]), resampler.sums(one_hot)
    return _mean_found(ratio(right, total).T)


def _mean_found(parts: Draws) -> Draws:
    """Mean over the first axis of what is a number; NaN for a draw that holds none of the tiles."""
    found = np.isfinite(parts)
    return ratio(np.where(found, parts, 0.0).sum(axis=0), found.sum(axis=0).astype(np.float64))


def _transfer(model: ModelFeatures, tiles: PairedSet, name: str, seed: int) -> tuple[list[Measure], pd.DataFrame]:
    """Train on the tiles of one scanner (of one staining), test on held-out tissue under each."""
    rows = thin(tiles, tiles.known(name, tiles.labelled()), MAX_TILES * 2, seed)
    if not len(rows):
        raise ValueError("the tiles have no column label with classes of tissue")
    held = tiles.column("stain", rows) if name == "scanner" and "stain" in tiles.frame else np.full(len(rows), "")
    cells = [found for value in np.unique(held) for found in _cell(model, tiles, rows[held == value], name, seed)]
    if not cells:
        raise ValueError(f"no two classes of tissue occur in two {tiles.apart_column()}s under every {name}")
    table = []
    for train, test in dict.fromkeys((cell.train, cell.test) for cell in cells):
        table.append(_row([c for c in cells if (c.train, c.test) == (train, test)], tiles, name, seed))
    own = {cell.train for cell in cells}
    return _drops(cells, tiles, name, seed, len(own)), pd.DataFrame(table)


class _Cell(NamedTuple):
    """Predictions of probes trained under one value for tiles under another."""

    train: str
    test: str
    rows: Rows
    truth: Labels
    predicted: Labels
    probability: FloatArray
    position: npt.NDArray[np.intp]
    """Of the truth among the columns of `probability`."""


def _cell(model: ModelFeatures, tiles: PairedSet, rows: Rows, name: str, seed: int) -> list[_Cell]:
    values, apart = tiles.column(name, rows), tiles.column(tiles.apart_column(), rows)
    y = tiles.column("label", rows)
    keep = [
        c for c in np.unique(y) if all(len(np.unique(apart[(y == c) & (values == v)])) >= 2 for v in np.unique(values))
    ]
    if len(keep) < 2 or len(np.unique(values)) < 2:
        return []
    some = np.isin(y, keep)
    rows, values, apart, y = rows[some], values[some], apart[some], y[some]
    x, cells = model.load(rows), []
    folds = _folds(apart)
    for trained in np.unique(values):
        parts: dict[str, list[tuple[Any, ...]]] = {str(v): [] for v in np.unique(values)}
        for train, test in folds:
            own = train[values[train] == trained]
            if len(np.unique(y[own])) < len(keep):
                continue  # no probe can know a class it never saw
            probe = fit(x[own], y[own], apart[own], seed)
            probability = probe.predict_proba(x[test])
            for tested, found in parts.items():
                there = values[test] == tested
                if there.any():
                    found.append((test[there], probability[there], probe.classes_))
        for tested, found in parts.items():
            if found:
                at = np.concatenate([part[0] for part in found])
                p = np.concatenate([part[1] for part in found])
                classes = found[0][2]
                position = np.searchsorted(classes, y[at])
                cells.append(_Cell(str(trained), tested, rows[at], y[at], classes[p.argmax(axis=1)], p, position))
    return cells


def _row(cells: Sequence[_Cell], tiles: PairedSet, name: str, seed: int) -> dict[str, object]:
    """One training and one test scanner, all held stainings pooled."""
    truth, predicted, resampler = _pool(cells, tiles, seed)
    low, high = percentiles(accuracy_draws(truth, predicted, resampler), resampler.n_groups)
    ece, drawn = _ece(cells, resampler)
    ece_low, ece_high = percentiles(drawn, resampler.n_groups)
    return {
        "condition": name,
        "train": cells[0].train,
        "test": cells[0].test,
        "accuracy": balanced_accuracy(truth, predicted),
        "low": low,
        "high": high,
        "ece": ece,
        "ece_low": ece_low,
        "ece_high": ece_high,
        "n": len(truth),
        "n_groups": resampler.n_groups,
    }


def _pool(cells: Sequence[_Cell], tiles: PairedSet, seed: int) -> tuple[Labels, Labels, Resampler]:
    rows = np.concatenate([cell.rows for cell in cells])
    truth, predicted = (np.concatenate([getattr(c, what) for c in cells]) for what in ("truth", "predicted"))
    return truth, predicted, Resampler(tiles.column(tiles.unit_column(), rows), seed)


def _ece(cells: Sequence[_Cell], resampler: Resampler) -> tuple[float, Draws]:
    """Expected calibration error, and the same under every draw (which rises a little, as bins get fewer tiles)."""
    width = max(cell.probability.shape[1] for cell in cells)
    # A class that a probe of another staining did not know has probability 0.
    probability = np.concatenate([np.pad(c.probability, ((0, 0), (0, width - c.probability.shape[1]))) for c in cells])
    position = np.concatenate([cell.position for cell in cells])
    said, right = probability.max(axis=1), probability.argmax(axis=1) == position
    which = np.clip(np.ceil(said * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.eye(BINS)[which] * (right - said)[:, None]
    drawn = ratio(np.abs(resampler.sums(gaps)).sum(axis=1), resampler.sums(np.ones(len(said))))
    return calibration_error(probability, position, bins=BINS).ece, drawn


def _drops(cells: list[_Cell], tiles: PairedSet, name: str, seed: int, own: int) -> list[Measure]:
    """Mean accuracy at home and abroad, their difference, and the same of calibration error."""
    measures = []
    rows = np.concatenate([cell.rows for cell in cells])
    names, codes = np.unique(tiles.column(tiles.unit_column(), rows), return_inverse=True)
    # One resampler over the units of all cells, so that home and abroad are drawn alike.
    shared = Resampler(np.arange(len(names)), seed)
    home: list[dict[str, tuple[float, Draws]]] = []
    away: list[dict[str, tuple[float, Draws]]] = []
    bounds = np.cumsum([0, *(len(cell.rows) for cell in cells)])
    for number, cell in enumerate(cells):
        local = _Local(shared, codes[bounds[number] : bounds[number + 1]])
        accuracy = balanced_accuracy(cell.truth, cell.predicted), accuracy_draws(cell.truth, cell.predicted, local)
        (home if cell.train == cell.test else away).append({"accuracy": accuracy, "ece": _ece([cell], local)})
    if not home or not away or own < 2:
        raise ValueError(f"held-out tissue of the training {name} and of another one are both needed")
    n, groups = min(len(cell.rows) for cell in cells), len(names)
    for what in ("accuracy", "ece"):
        (inside, d_in), (outside, d_out) = (_mean([v[what] for v in part]) for part in (home, away))
        measures.append(Measure(f"probe_{what}", f"same {name}", inside, n, groups, d_in))
        measures.append(Measure(f"probe_{what}", f"other {name}", outside, n, groups, d_out))
        if what == "accuracy":
            measures.append(Measure("probe_drop", name, inside - outside, n, groups, d_in - d_out))
    return measures


def _mean(found: Sequence[tuple[float, Draws]]) -> tuple[float, Draws]:
    """Mean of numbers, and of their draws; what a draw misses does not count in it."""
    return float(np.mean([value for value, _ in found])), _mean_found(np.stack([drawn for _, drawn in found]))


class _Local(Resampler):
    """Draws of another resampler, seen by some of its tiles."""

    def __init__(self, whole: Resampler, codes: npt.NDArray[np.intp]) -> None:
        self.codes, self.n_groups, self.times = codes, whole.n_groups, whole.times
        self.sizes = np.bincount(codes, minlength=self.n_groups).astype(np.float64)
