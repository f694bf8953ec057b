"""95 % intervals by resampling whole groups: tiles of one place or slide are not independent, groups are."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pathokd.types import FloatArray

RESAMPLES = 1000
Interval = tuple[float, float]


def group_codes(groups: npt.NDArray[Any]) -> tuple[npt.NDArray[np.intp], int]:
    """Groups as numbers 0, 1, ... and how many there are."""
    names, codes = np.unique(groups, return_inverse=True)
    return codes, len(names)


def balanced_accuracy_interval(
    truth: npt.NDArray[Any],
    predicted: npt.NDArray[Any],
    groups: npt.NDArray[Any],
    seed: int,
    resamples: int = RESAMPLES,
    *,
    minus: npt.NDArray[Any] | None = None,
) -> Interval:
    """Percentile interval of balanced accuracy, or of a paired difference of two, under resampling of groups.

    Args:
        truth: (n,) classes.
        predicted: (n,) classes.
        groups: (n,) what is resampled as a whole.
        seed: Of the resampling.
        resamples: How many.
        minus: (n,) classes by another prediction, whose balanced accuracy is subtracted in every resample.

    Returns:
        The 2.5th and 97.5th percentile; NaN of one group, which says nothing of how groups vary. A class that a
        resample happens to miss does not count in that resample.
    """
    group, n_groups = group_codes(groups)
    if n_groups < 2:
        return float("nan"), float("nan")
    classes, label = np.unique(truth, return_inverse=True)
    right, total = np.zeros((n_groups, len(classes))), np.zeros((n_groups, len(classes)))
    gain = (truth == predicted).astype(float) - (0.0 if minus is None else truth == minus)
    np.add.at(right, (group, label), gain)
    np.add.at(total, (group, label), 1.0)
    times = _draws(n_groups, seed, resamples)
    right, total = times @ right, times @ total
    recall = np.divide(right, total, out=np.full_like(right, np.nan), where=total > 0)
    return _percentiles(np.nanmean(recall, axis=1))


def weighted_mean_interval(
    values: FloatArray, weights: FloatArray, groups: npt.NDArray[Any], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Percentile interval of a weighted mean under resampling of groups.

    Args:
        values: (n,) numbers.
        weights: (n,) positive weights.
        groups: (n,) what is resampled as a whole.
        seed: Of the resampling.
        resamples: How many.

    Returns:
        The 2.5th and 97.5th percentile; NaN of one group.
    """
    group, n_groups = group_codes(groups)
    if n_groups < 2:
        return float("nan"), float("nan")
    top = np.bincount(group, weights * values, n_groups)
    bottom = np.bincount(group, weights, n_groups)
    times = _draws(n_groups, seed, resamples)
    return _percentiles((times @ top) / (times @ bottom))


def _draws(n_groups: int, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """How often each resample (row) holds each group (column)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples).astype(np.float64)


def _percentiles(draws: FloatArray) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
