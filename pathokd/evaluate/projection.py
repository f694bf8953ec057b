"""Pictures of feature space made small: two principal axes of some tiles, and one place under every condition."""

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from pathokd.evaluate.paired_features import ModelFeatures
from pathokd.evaluate.paired_set import PairedSet
from pathokd.evaluate.robust_probes import thin
from pathokd.metrics.similarity import unit_rows

POINTS = 1000
STRIPS = 6
"""Places shown, drawn at random."""


def projections(model: ModelFeatures, tiles: PairedSet, seed: int = 0) -> pd.DataFrame:
    """Unit features on their first two principal axes.

    Args:
        model: Features of the set.
        tiles: The set.
        seed: Of the choice of tiles.

    Returns:
        One row per tile: pc1, pc2, share1, share2 (of the variance), and those of scanner, stain, site and label
        that are known.
    """
    rows = thin(tiles, np.arange(len(tiles)), POINTS, seed)
    unit = unit_rows(torch.from_numpy(model.load(rows))).numpy()
    if min(unit.shape) < 2 or not (unit.std(axis=0) > 1e-6).any():
        return pd.DataFrame()  # a collapsed model has no axes
    pca = PCA(2, random_state=seed).fit(unit)
    axes = pca.transform(unit)
    # The sign of an axis is free; the larger tail points to the right.
    axes *= np.where(axes.max(axis=0) >= -axes.min(axis=0), 1.0, -1.0)
    known = {name: tiles.column(name, rows) for name in ("scanner", "stain", "site", "label") if name in tiles.frame}
    share1, share2 = pca.explained_variance_ratio_.tolist()
    return pd.DataFrame({"pc1": axes[:, 0], "pc2": axes[:, 1], "share1": share1, "share2": share2, **known})


def strips(model: ModelFeatures, tiles: PairedSet, seed: int = 0, count: int = STRIPS) -> pd.DataFrame:
    """Some places under every condition, with the cosine to the first condition.

    The same places for every model, drawn by `seed`.

    Args:
        model: Features of the set.
        tiles: A registered set.
        seed: Of the choice of places.
        count: How many.

    Returns:
        One row per place and condition: pair_id, condition, row, cosine.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(tiles.places))[:count])
    first = next(iter(tiles.conditions))
    base = unit_rows(torch.from_numpy(model.load(tiles.rows[first][chosen])))
    parts = []
    for name, rows in tiles.rows.items():
        other = unit_rows(torch.from_numpy(model.load(rows[chosen])))
        cosines = (base * other).sum(dim=1).clamp(-1, 1).numpy()
        parts.append(
            pd.DataFrame({"pair_id": tiles.places[chosen], "condition": name, "row": rows[chosen], "cosine": cosines})
        )
    return pd.concat(parts, ignore_index=True)
