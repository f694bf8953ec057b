"""Is a tile found again under another scanner or staining, and do matches stand out from chance."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pathokd.evaluate.bootstrap import Interval, weighted_mean_interval
from pathokd.evaluate.pairs import RegisteredPair
from pathokd.metrics import cosine, paired_hits, separation
from pathokd.types import FloatArray


class RetrievalScore(NamedTuple):
    """Means over pairs of conditions, each pair counting once."""

    topk: float
    """Share of tiles found again among the k nearest, both directions."""
    ci: Interval
    """95 %, by resampling places, or what `units` names, with the gallery as it is."""
    k: int
    n_tiles: int
    """Tiles per condition, mean over pairs: top-k falls as it grows."""
    n_pairs: int
    n_places: int
    chance: float
    cosine: float
    """Mean cosine of matched tiles; read it with `separation` only, since collapse makes it perfect."""
    separation: float
    """Matched minus mismatched mean cosine."""
    tied: float
    """Share of queries with a tie; near 1 means a collapsed encoder."""


def score_retrieval(
    features: FloatArray,
    pairs: Sequence[RegisteredPair],
    places: npt.NDArray[Any],
    k: int = 10,
    seed: int = 0,
    *,
    units: npt.NDArray[Any] | None = None,
) -> RetrievalScore | None:
    """Score registered pairs.

    Args:
        features: (n, d), rows as in the table that `pairs` and `places` come from.
        pairs: From `registered_pairs`.
        places: (n,) place of every row.
        k: How many nearest tiles count as found.
        seed: Of the resampling.
        units: (n,) what is resampled as a whole, say the case of every row; None takes places.

    Returns:
        The score, or None if there is no pair of conditions to compare.
    """
    if not pairs:
        return None
    x = torch.from_numpy(np.ascontiguousarray(features))
    hits, weights, groups, seen, cosines, separations, tied = [], [], [], [], [], [], []
    for pair in pairs:
        a, b = x[pair.rows_first], x[pair.rows_second]
        found = paired_hits(a, b, k)
        hits.append(((found.a_to_b + found.b_to_a) / 2).numpy())
        weights.append(np.full(len(a), 1 / len(a)))
        groups.append((places if units is None else units)[pair.rows_first])
        seen.append(places[pair.rows_first])
        cosines.append(float(cosine(a, b).mean()))
        separations.append(float(separation(a, b)))
        tied.append(found.tied)
    hit, weight, group = np.concatenate(hits), np.concatenate(weights), np.concatenate(groups)
    sizes = [len(pair.rows_first) for pair in pairs]
    return RetrievalScore(
        topk=float(np.average(hit, weights=weight)),
        ci=weighted_mean_interval(hit, weight, group, seed),
        k=k,
        n_tiles=round(float(np.mean(sizes))),
        n_pairs=len(pairs),
        n_places=len(np.unique(np.concatenate(seen))),
        chance=float(np.mean([min(1.0, k / (2 * n - 1)) for n in sizes])),
        cosine=float(np.mean(cosines)),
        separation=float(np.mean(separations)),
        tied=float(np.mean(tied)),
    )
