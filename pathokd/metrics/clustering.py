"""Do clusters follow tissue or centre: the clustering score of PathoROB, by k-means on unit features."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from pathokd.metrics.neighbours import Labels
from pathokd.metrics.similarity import unit_rows

N_INIT_CHOICE, N_INIT = 20, 5
"""Starts of k-means when the number of clusters is chosen, and when it is scored."""


class QuadScore(NamedTuple):
    """Clusters of one quad: two classes in two centres; means over trials."""

    classes: tuple[str, str]
    centres: tuple[str, str]
    score: float
    """ARI with the classes minus ARI with the centres."""
    ari_bio: float
    ari_confounder: float
    clusters: int
    """As chosen by the silhouette; 1 where features do not differ, and then all is 0."""
    n: int


class ClusteringScore(NamedTuple):
    """Means over quads. These share tiles: how they vary is no measure of how sure the mean is."""

    score: float
    """In [-1, 1]: 1 clusters are the classes, -1 clusters are the centres."""
    ari_bio: float
    ari_confounder: float
    sd: float
    """Of the score over quads and trials (ddof 1, as published)."""
    quads: tuple[QuadScore, ...]
    n: int
    """Tiles in at least one quad."""


def clustering_score(
    features: Float[Tensor, "n dim"],
    bio: Labels,
    confounder: Labels,
    *,
    clusters: Sequence[int] = range(2, 31),
    trials: int = 50,
    seed: int = 0,
) -> ClusteringScore:
    """How much better clusters match the classes than the centres, averaged over all 2 by 2 choices of them.

    Where a quad has fewer different tiles than clusters asked for, larger numbers are left out. (PathoROB's code
    chooses the number of clusters in the first quad and keeps it for all; here each quad has its own.)

    Args:
        features: Features of n tiles.
        bio: (n,) biological class of each.
        confounder: (n,) centre or scanner of each.
        clusters: Numbers of clusters to choose from, each at least 2; one number fixes it.
        trials: Runs of k-means, each from its own seed.
        seed: Of the first run.

    Returns:
        The score.

    Raises:
        ValueError: Labels that do not fit, no two classes that occur in the same two centres, a number of clusters
            below 2, or a row without direction.

    Reference:
        Koemen et al. 2025, "Towards Robust Foundation Models for Digital Pathology" (PathoROB), clustering score.
    """
    for name, column in (("bio", bio), ("confounder", confounder)):
        if column.shape != (features.shape[0],):
            raise ValueError(f"{name} should have one label for each of {features.shape[0]} tiles, got {column.shape}.")
    if min(clusters, default=0) < 2 or trials < 1:
        raise ValueError(f"clusters should be 2 or more, in 1 trial or more, got {list(clusters)} in {trials}.")
    unit = unit_rows(features.detach()).cpu().numpy()
    scores, found, used = [], [], np.zeros(len(unit), dtype=bool)
    for classes, centres, rows in quads(bio, confounder):
        chosen, aris = _quad(unit[rows], bio[rows], confounder[rows], clusters, trials, seed)
        ari_bio, ari_confounder = aris.mean(axis=0)
        each = aris[:, 0] - aris[:, 1]
        scores.append(each)
        found.append(
            QuadScore(classes, centres, float(each.mean()), float(ari_bio), float(ari_confounder), chosen, len(rows))
        )
        used[rows] = True
    if not found:
        raise ValueError(
            "clusters are scored on two classes that both occur in the same two centres (or scanners), and there are "
            "none; add tiles, or name other columns."
        )
    pooled = np.concatenate(scores)
    return ClusteringScore(
        score=float(pooled.mean()),
        ari_bio=float(np.mean([quad.ari_bio for quad in found])),
        ari_confounder=float(np.mean([quad.ari_confounder for quad in found])),
        sd=float(pooled.std(ddof=1)) if len(pooled) > 1 else float("nan"),
        quads=tuple(found),
        n=int(used.sum()),
    )


def quads(bio: Labels, confounder: Labels) -> Iterator[tuple[tuple[str, str], tuple[str, str], npt.NDArray[np.intp]]]:
    """Every choice of two classes and two centres whose four cells all hold tiles.

    Args:
        bio: (n,) biological class of each tile.
        confounder: (n,) centre or scanner of each.

    Yields:
        The classes, the centres, and the rows.
    """
    for classes in itertools.combinations(np.unique(bio), 2):
        for centres in itertools.combinations(np.unique(confounder), 2):
            rows = np.flatnonzero(np.isin(bio, classes) & np.isin(confounder, centres))
            if len(set(zip(bio[rows].tolist(), confounder[rows].tolist(), strict=True))) == 4:
                yield (str(classes[0]), str(classes[1])), (str(centres[0]), str(centres[1])), rows


def _quad(
    unit: npt.NDArray[np.floating],
    bio: Labels,
    confounder: Labels,
    clusters: Sequence[int],
    trials: int,
    seed: int,
) -> tuple[int, npt.NDArray[np.float64]]:
    """The number of clusters, and per trial the two adjusted Rand indices."""
    # Rounded, since rows of a collapsed encoder may differ in their last bit.
    different = len(np.unique(unit.round(6), axis=0))
    # A silhouette needs two clusters at least and one tile less than tiles at most.
    possible = sorted({k for k in clusters if k <= min(different, len(unit) - 1)})
    if not possible:
        return 1, np.zeros((trials, 2))
    chosen = possible[0] if len(possible) == 1 else max(possible, key=lambda k: _silhouette(unit, k, seed))
    aris = np.empty((trials, 2))
    for trial in range(trials):
        labels = _cluster(unit, chosen, N_INIT, seed + trial)
        aris[trial] = adjusted_rand_score(bio, labels), adjusted_rand_score(confounder, labels)
    return chosen, aris


def _silhouette(unit: npt.NDArray[np.floating], k: int, seed: int) -> float:
    return float(silhouette_score(unit, _cluster(unit, k, N_INIT_CHOICE, seed), metric="cosine"))


def _cluster(unit: npt.NDArray[np.floating], k: int, n_init: int, seed: int) -> npt.NDArray[np.integer]:
    labels: npt.NDArray[np.integer] = KMeans(k, init="random", n_init=n_init, random_state=seed).fit(unit).labels_
    return labels
