"""Are probabilities as good as they say: expected calibration error, with the bins of a reliability diagram."""

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pathokd.types import FloatArray, IntArray

Bins: TypeAlias = Literal["width", "mass"]


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram; means are NaN where n is 0."""

    low: float
    high: float
    n: int
    confidence: float
    """Mean of what was said."""
    accuracy: float
    """Share that came true."""


class Calibration(NamedTuple):
    """Calibration of n predictions."""

    ece: float
    """Mean of |accuracy - confidence| over predictions, bin by bin: 0 is calibrated."""
    mce: float
    """The largest gap of a bin."""
    bins: tuple[ReliabilityBin, ...]
    n: int


def calibration_error(probabilities: FloatArray, truth: IntArray, *, bins: int = 15, by: Bins = "width") -> Calibration:
    """Expected calibration error of the class that gets the highest probability.

    Args:
        probabilities: (n, classes), rows that sum to 1.
        truth: (n,) position of the right class.
        bins: How many; a prediction of p falls into the bin with low < p <= high.
        by: `width` makes bins equally wide, `mass` puts equally many predictions into each.

    Returns:
        The error and its bins.

    Raises:
        ValueError: Shapes that do not fit, classes out of range, rows that are no probabilities, or no bins.

    Reference:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 3 and 5; Nguyen and O'Connor 2015 for
        bins of equal mass.
    """
    _check(probabilities, truth, bins)
    right = probabilities.argmax(axis=1) == truth
    return _calibration(probabilities.max(axis=1).astype(np.float64), right, bins, by)


def classwise_calibration_error(
    probabilities: FloatArray, truth: IntArray, *, bins: int = 15, by: Bins = "width"
) -> float:
    """Mean over classes of the calibration error of that class's own probability, likely or not.

    Args:
        probabilities: (n, classes), rows that sum to 1.
        truth: (n,) position of the right class.
        bins: How many for each class.
        by: As in `calibration_error`.

    Returns:
        The error.

    Raises:
        ValueError: As in `calibration_error`.

    Reference:
        Kull et al. 2019, "Beyond temperature scaling", classwise-ECE.
    """
    _check(probabilities, truth, bins)
    columns = probabilities.astype(np.float64).T
    return float(np.mean([_calibration(said, truth == c, bins, by).ece for c, said in enumerate(columns)]))


def _calibration(said: npt.NDArray[np.float64], true: npt.NDArray[np.bool_], bins: int, by: Bins) -> Calibration:
    if by == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
    else:
        edges = np.quantile(said, np.linspace(0.0, 1.0, bins + 1))
        edges[0], edges[-1] = 0.0, 1.0
    which = np.clip(np.searchsorted(edges, said, side="left") - 1, 0, bins - 1)
    n = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, said, minlength=bins) / n
        accuracy = np.bincount(which, true, minlength=bins) / n
    gap = np.abs(accuracy - confidence)[n > 0]
    return Calibration(
        ece=float(np.average(gap, weights=n[n > 0])),
        mce=float(gap.max()),
        bins=tuple(
            ReliabilityBin(float(low), float(high), int(count), float(c), float(a))
            for low, high, count, c, a in zip(edges[:-1], edges[1:], n, confidence, accuracy, strict=True)
        ),
        n=len(said),
    )


def _check(probabilities: FloatArray, truth: npt.NDArray[Any], bins: int) -> None:
    if probabilities.ndim != 2 or truth.shape != probabilities.shape[:1] or not probabilities.size:
        raise ValueError(
            f"probabilities should have shape (n, classes) and truth (n,), got {probabilities.shape} and {truth.shape}."
        )
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= probabilities.shape[1]:
        raise ValueError(f"truth should hold positions of classes, 0 to {probabilities.shape[1] - 1}.")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (np.abs(sums - 1) < 1e-3).all() or probabilities.min() < 0:
        raise ValueError("probabilities should be 0 or more and sum to 1 in every row; pass logits through a softmax.")
    if bins < 1:
        raise ValueError(f"bins should be at least 1, got {bins}.")
