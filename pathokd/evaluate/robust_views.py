"""What needs the model itself: rotation and flip invariance, and curves over the severity of simulated changes."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from pathokd.data.views import d4
from pathokd.embed import Embedder
from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import PairedSet, Read, Rows
from pathokd.evaluate.resampling import Measure, Resampler
from pathokd.evaluate.robust_probes import thin
from pathokd.evaluate.severity import severity_curves
from pathokd.metrics.invariance import D4, turn_invariance

BATCH = 32


class Viewed(NamedTuple):
    """Measures of one model, and its severity curves (empty where they were not asked for)."""

    measures: list[Measure]
    severity: pd.DataFrame
    not_shown: list[tuple[str, str]]


def measure_views(
    model: ModelFeatures, tiles: PairedSet, *, turn_tiles: int = 128, severity_tiles: int = 0, seed: int = 0
) -> Viewed:
    """Embed turned and changed tiles.

    Args:
        model: The model; one known by stored features only has neither measure.
        tiles: The set.
        turn_tiles: Tiles turned and flipped; 0 leaves this out.
        severity_tiles: Labelled tiles changed by every factor; 0 leaves this out, as it takes minutes.
        seed: Of the choice of tiles and of all noise.

    Returns:
        Measures and curves.
    """
    whats = ("rotation and flip invariance", "severity curves")
    if model.embedder is None or tiles.read is None:
        reason = f"{model.name} is known by its stored features only, and this needs the model and the pictures"
        return Viewed([], pd.DataFrame(), [(what, reason) for what in whats])
    not_shown, measures, curves = [], [], pd.DataFrame()
    first = _one_condition(tiles, np.arange(len(tiles)))
    if turn_tiles:
        measures = _turns(model.embedder, tiles.read, tiles, thin(tiles, first, turn_tiles, seed), seed)
    else:
        not_shown.append((whats[0], "not asked for: set --turn-tiles"))
    if not severity_tiles:
        not_shown.append((whats[1], "not asked for: set --severity-tiles, say to 200"))
    else:
        labelled = thin(tiles, _one_condition(tiles, tiles.labelled()), severity_tiles, seed)
        try:
            curves = _severity(model.embedder, tiles.read, tiles, labelled, seed)
        except ValueError as error:
            not_shown.append((whats[1], str(error)))
    return Viewed(measures, curves, not_shown)


def _one_condition(tiles: PairedSet, rows: Rows) -> Rows:
    """Rows of the first condition only, where there are several."""
    if not tiles.registered or not len(rows):
        return rows
    first: Rows = rows[tiles.column("condition", rows) == next(iter(tiles.conditions))]
    return first


def _turns(embedder: Embedder, read: Read, tiles: PairedSet, rows: Rows, seed: int) -> list[Measure]:
    features = np.empty((len(D4), len(rows), embedder.dim), np.float32)
    for start in range(0, len(rows), BATCH):
        images = [read(int(row)) for row in rows[start : start + BATCH]]
        for turn in range(len(D4)):
            features[turn, start : start + BATCH] = embedder([d4(image, turn) for image in images])
    resampler = Resampler(tiles.column(tiles.unit_column(), rows), seed)
    measures = []
    scores = turn_invariance(torch.from_numpy(features))
    columns = []
    for score in scores:
        if score.tiles is not None:
            hits = (score.tiles.first_to_second + score.tiles.second_to_first)[:, 0] / 2
            values = torch.stack([score.tiles.cosine, score.tiles.separation, hits], dim=1).numpy()
            columns.append(values)
            draws = resampler.means(values)
            for number, (name, value) in enumerate(
                (("turn_cosine", score.cosine), ("turn_separation", score.separation), ("turn_top1", score.top1))
            ):
                measures.append(Measure(name, score.turn, value, score.n, resampler.n_groups, draws[:, number]))
    mean = np.mean(columns, axis=0)
    draws = resampler.means(mean)
    for number, name in enumerate(("turn_cosine", "turn_separation", "turn_top1")):
        value = float(mean[:, number].mean())
        measures.append(Measure(name, "all turns", value, len(rows), resampler.n_groups, draws[:, number]))
    return measures


def _severity(embedder: Embedder, read: Read, tiles: PairedSet, rows: Rows, seed: int) -> pd.DataFrame:
    labels, folds = tiles.column("label", rows), tiles.column(tiles.apart_column(), rows)
    cases = pd.Series(folds).groupby(labels).nunique()
    keep = np.isin(labels, cases.index[cases >= 2].to_numpy(str))
    rows, labels, folds = rows[keep], labels[keep], folds[keep]
    parts = np.unique(folds, return_inverse=True)[1] % 5
    # A class whose cases all fall into one part would be tested by probes that never saw it.
    spread = pd.Series(parts).groupby(labels).nunique()
    keep = np.isin(labels, spread.index[spread >= 2].to_numpy(str))
    rows, labels, parts = rows[keep], labels[keep], parts[keep]
    if len(np.unique(labels)) < 2:
        raise ValueError(f"the probe needs two classes of tissue in two {tiles.apart_column()}s each")
    groups = tiles.column(tiles.unit_column(), rows)
    return severity_curves(embedder, lambda i: read(int(rows[i])), labels, parts, groups, seed=seed)
