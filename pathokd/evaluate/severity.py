"""What a model bears: probe accuracy and similarity to the clean tile as one factor of stain or scanner grows.

Answers two questions with one measurement: how robust a model is to each factor (a curve per model), and up to which
severity a factor leaves the tissue class in the picture (the harm check of augmentations).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.preprocessing import StandardScaler

from pathokd.augment import FACTORS, PROFILES, ScannerProfile, StainSwap, StudentView
from pathokd.embed import Embedder
from pathokd.embed.reading import read_batches
from pathokd.evaluate.bootstrap import balanced_accuracy_interval
from pathokd.evaluate.probes import Labels, balanced_accuracy, choose_c, fit_linear
from pathokd.metrics import cosine
from pathokd.progress import Bars
from pathokd.types import Rgb

SEVERITIES = (0.25, 0.5, 0.75, 1.0)
Features = npt.NDArray[np.float32]
Probe = Callable[[Features], Labels]
Change = Callable[[Rgb, float, int], Rgb]
"""From a tile, a severity in [0, 1] and a seed to the changed tile."""


def known_changes() -> dict[str, Change]:
    """Every scanner factor, every scanner profile, restaining, and the student's view as a whole."""
    changes: dict[str, Change] = {name: factor.apply for name, factor in FACTORS.items()}
    changes |= {name: partial(_scanned, profile) for name, profile in PROFILES.items()}
    return {**changes, "restaining": _restained, "student view": _student_view}


def _restained(rgb: Rgb, severity: float, seed: int) -> Rgb:
    """Towards another of the known stainings for each tile."""
    swap = StainSwap(strength=(severity, severity))
    swap.set_random_seed(seed)
    return np.asarray(swap(image=rgb)["image"], np.uint8)


def _scanned(profile: ScannerProfile, rgb: Rgb, severity: float, seed: int) -> Rgb:
    return profile.apply(rgb, severity=severity, seed=seed)


def _student_view(rgb: Rgb, severity: float, seed: int) -> Rgb:
    view = StudentView(severity)
    view.set_random_seed(seed)
    return np.asarray(view(image=rgb)["image"], np.uint8)


def severity_curves(
    embedder: Embedder,
    read: Callable[[int], Rgb],
    labels: Labels,
    folds: Labels,
    groups: Labels | None = None,
    *,
    changes: Mapping[str, Change] | None = None,
    severities: Sequence[float] = SEVERITIES,
    draws: int = 1,
    seed: int = 0,
    workers: int = 2,
) -> pd.DataFrame:
    """Probe accuracy and cosine to the clean tile for every change at every severity.

    Two probes answer two questions. One is trained on clean tiles of the other folds and never sees a changed one: its
    accuracy is what a user of this model keeps. The other is trained on tiles of the other folds that were changed
    alike, with the penalties that were best on clean ones: if it also fails, the change took the tissue class out of
    the picture, not only out of the model's reach. From few tiles it also has to learn what a random change varies, so
    one changed copy of each makes a picture look poorer than it is: its accuracy is a lower bound that rises with
    `draws`.

    Args:
        embedder: the model.
        read: tile by number, 0 to n - 1.
        labels: (n,) classes.
        folds: (n,) what is held out in turn, such as cases.
        groups: (n,) what is resampled for the intervals; None takes each tile for itself.
        changes: by name; all known ones by default.
        severities: in (0, 1]; 0 is always measured once.
        draws: changed copies of each tile that the second probe is trained on; the first of a tile tests.
        seed: of probes, resampling, and of every tile's change.
        workers: threads that read and change tiles ahead of the model.

    Returns:
        One row per change and severity: change, severity, accuracy, low, high (95 %), drop (clean accuracy minus this),
        drop_low, drop_high (95 %, paired), the same of the probe trained on changed tiles as own_accuracy, own_drop,
        own_drop_low and own_drop_high, cosine, n.
    """
    n = len(labels)
    units = np.arange(n) if groups is None else groups
    wanted = known_changes() if changes is None else changes

    def embed(change: Change | None, severity: float, title: str, bars: Bars, draw: int = 0) -> Features:
        def changed(number: int) -> Rgb:
            tile = read(number)
            return tile if change is None else change(tile, severity, (seed + 1009 * draw) * 1_000_003 + number)

        features = np.empty((n, embedder.dim), np.float32)
        batches = read_batches(changed, range(n), batch_size=embedder.batch_size, workers=workers)
        for batch in bars.track(batches, title, -(-n // embedder.batch_size), keep=False):
            places, images = zip(*batch, strict=True)
            features[list(places)] = embedder(images)
        return features

    with Bars() as bars:
        clean = embed(None, 0.0, "clean", bars)
        penalties = _penalties(clean, labels, folds, units, seed)
        probes = _fit_probes(clean, labels, folds, penalties)
        baseline = _predict(probes, clean, labels, folds)
        rows = [_row("clean", 0.0, labels, baseline, baseline, baseline, units, seed, 1.0)]
        jobs = [(name, severity) for name in wanted for severity in severities]
        for name, severity in bars.track(jobs, "severity curves", len(jobs)):
            copies = [embed(wanted[name], severity, f"{name} {severity:g}", bars, draw) for draw in range(draws)]
            x = copies[0]
            alike = float(cosine(torch.from_numpy(clean), torch.from_numpy(x)).mean())
            trained = _fit_probes(np.concatenate(copies), np.tile(labels, draws), np.tile(folds, draws), penalties)
            own = _predict(trained, x, labels, folds)
            predicted = _predict(probes, x, labels, folds)
            rows.append(_row(name, severity, labels, predicted, own, baseline, units, seed, alike))
    return pd.DataFrame(rows)


def _penalties(x: Features, labels: Labels, folds: Labels, units: Labels, seed: int) -> dict[Any, float]:
    """For each fold the C that serves the others best."""
    trained = {fold: folds != fold for fold in np.unique(folds)}
    return {
        fold: choose_c(StandardScaler().fit_transform(x[train]), labels[train], units[train], seed)
        for fold, train in trained.items()
    }


def _fit_probes(x: Features, labels: Labels, folds: Labels, penalties: Mapping[Any, float]) -> dict[Any, Probe]:
    """For each fold, a probe trained on the others."""
    return {fold: fit_linear(x[folds != fold], labels[folds != fold], C=C) for fold, C in penalties.items()}


def _predict(probes: Mapping[Any, Probe], x: Features, labels: Labels, folds: Labels) -> Labels:
    """Each tile's class by the probe that did not see its fold."""
    predicted = labels.copy()
    for fold, probe in probes.items():
        predicted[folds == fold] = probe(x[folds == fold])
    return predicted


def _row(
    name: str,
    severity: float,
    labels: Labels,
    predicted: Labels,
    own: Labels,
    baseline: Labels,
    units: Labels,
    seed: int,
    alike: float,
) -> dict[str, object]:
    accuracy, clean = balanced_accuracy(labels, predicted), balanced_accuracy(labels, baseline)
    low, high = balanced_accuracy_interval(labels, predicted, units, seed)
    drop_low, drop_high = balanced_accuracy_interval(labels, baseline, units, seed, minus=predicted)
    own_low, own_high = balanced_accuracy_interval(labels, baseline, units, seed, minus=own)
    return {
        "change": name,
        "severity": severity,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "drop": clean - accuracy,
        "drop_low": drop_low,
        "drop_high": drop_high,
        "own_accuracy": balanced_accuracy(labels, own),
        "own_drop": clean - balanced_accuracy(labels, own),
        "own_drop_low": own_low,
        "own_drop_high": own_high,
        "cosine": alike,
        "n": len(labels),
    }


def tolerated(
    curves: pd.DataFrame, at_most: float = 0.02, drop: Literal["drop", "own_drop"] = "drop"
) -> dict[str, float]:
    """The highest severity of each change up to which no accuracy falls by more than `at_most`; 0 if none.

    Args:
        curves: from `severity_curves`.
        at_most: what may be lost.
        drop: `drop` asks what the model bears, `own_drop` what the picture bears.
    """
    found = {}
    for name, curve in curves[curves["change"] != "clean"].groupby("change", sort=False):
        ordered = curve.sort_values("severity")
        fine = (ordered[drop] <= at_most).cumprod().astype(bool)
        found[str(name)] = float(ordered["severity"][fine].max()) if fine.any() else 0.0
    return found
