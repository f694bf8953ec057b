"""95 % intervals by resampling whole groups: tiles of one place or slide are not independent, groups are."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm
from scipy.stats import t as student_t

from pathokd.types import FloatArray

RESAMPLES = 1000
FEW_GROUPS = 5
"""Intervals of fewer are too narrow, see `percentiles`; of fewer patients or cases, places are resampled instead."""
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
    """Interval of balanced accuracy, or of a paired difference of two, under resampling of groups.

    Args:
        truth: (n,) classes.
        predicted: (n,) classes.
        groups: (n,) what is resampled as a whole.
        seed: Of the resampling.
        resamples: How many.
        minus: (n,) classes by another prediction, whose balanced accuracy is subtracted in every resample.

    Returns:
        As `percentiles`; NaN of one group, which says nothing of how groups vary. A class that a resample happens to
        miss does not count in that resample.
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
    return percentiles(np.nanmean(recall, axis=1), n_groups)


def weighted_mean_interval(
    values: FloatArray, weights: FloatArray, groups: npt.NDArray[Any], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Interval of a weighted mean under resampling of groups.

    Args:
        values: (n,) numbers.
        weights: (n,) positive weights.
        groups: (n,) what is resampled as a whole.
        seed: Of the resampling.
        resamples: How many.

    Returns:
        As `percentiles`; NaN of one group.
    """
    group, n_groups = group_codes(groups)
    if n_groups < 2:
        return float("nan"), float("nan")
    top = np.bincount(group, weights * values, n_groups)
    bottom = np.bincount(group, weights, n_groups)
    times = _draws(n_groups, seed, resamples)
    return percentiles((times @ top) / (times @ bottom), n_groups)


def _draws(n_groups: int, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """How often each resample (row) holds each group (column)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples).astype(np.float64)


def percentiles(draws: FloatArray, n_groups: int) -> Interval:
    """95 % interval from resamples of groups: expanded percentiles.

    The 2.5th and 97.5th percentile are too narrow where groups are few (of 8 groups they hold 89 % of the time), as
    resamples vary by the groups' own spread, not by its unbiased estimate, and normally, not as Student's t. Further
    out lie the percentiles that allow for both: .6 and 99.4 of 8 groups, 2.3 and 97.7 of 100. Of fewer than five
    groups they are the least and the greatest resample, and still too narrow.

    Args:
        draws: (resamples,) one number under each; those that are no numbers do not count.
        n_groups: how many groups were resampled.

    Returns:
        Low and high; NaN without draws or of one group.

    Reference:
        Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69,
        expanded percentile interval.
    """
    found = draws[np.isfinite(draws)]
    if not len(found) or n_groups < 2:
        return float("nan"), float("nan")
    wide = np.sqrt(n_groups / (n_groups - 1)) * student_t.ppf(0.975, n_groups - 1)
    low, high = np.percentile(found, 100 * norm.cdf([-wide, wide]))
    return float(low), float(high)
