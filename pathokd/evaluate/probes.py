"""What frozen features know about tissue: a linear probe and 10 nearest neighbours, by balanced accuracy."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from pathokd.evaluate.bootstrap import Interval, balanced_accuracy_interval, group_codes
from pathokd.types import FloatArray, IntArray

Labels = npt.NDArray[Any]
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 strengths tried, strongest first; with standardised features the best lies well inside."""
INNER_FOLDS = 3
NEIGHBOURS = 10


class ProbeResult(NamedTuple):
    """Balanced accuracies on held-out tiles, with 95 % intervals by grouped bootstrap."""

    accuracy: float
    """Of the linear probe."""
    ci: Interval
    n: int
    """Tiles tested."""
    knn10_accuracy: float
    """Of 10 nearest neighbours by cosine."""
    knn10_ci: Interval
    n_groups: int
    """Independent groups (places, slides) among the tiles tested."""
    n_classes: int


def linear_probe(
    train_x: FloatArray,
    train_y: Labels,
    test_x: FloatArray,
    test_y: Labels,
    groups: Labels | None = None,
    seed: int = 0,
    *,
    train_groups: Labels | None = None,
) -> ProbeResult:
    """Train on one set of tiles, test on another.

    Args:
        train_x: (m, d) features.
        train_y: (m,) classes.
        test_x: (n, d) features.
        test_y: (n,) classes.
        groups: (n,) what is resampled as a whole for the interval; None takes each tile for itself.
        seed: Of the inner folds and of the resampling.
        train_groups: (m,) groups that the choice of C keeps together; None takes each tile for itself.

    Returns:
        Accuracies, intervals and counts.

    Raises:
        ValueError: Sizes that do not match, fewer than two classes, or features that are not finite.
    """
    _check(train_x, train_y)
    _check(test_x, test_y)
    linear = predict_linear(train_x, train_y, test_x, train_groups, seed)
    nearest = predict_nearest(train_x, train_y, test_x)
    return _result(test_y, linear, nearest, groups, seed)


def cross_probe(x: FloatArray, y: Labels, folds: Labels, groups: Labels | None = None, seed: int = 0) -> ProbeResult:
    """Test every tile once, by probes trained on the other folds, and pool the predictions.

    Args:
        x: (n, d) features.
        y: (n,) classes.
        folds: (n,) say the case: a tile is never tested by a probe that saw its fold.
        groups: (n,) what is resampled as a whole for the interval, and kept together in the choice of C.
        seed: Of the inner folds and of the resampling.

    Returns:
        Accuracies over all n tiles, intervals and counts.

    Raises:
        ValueError: Sizes that do not match, fewer than two folds or classes, or features that are not finite.
    """
    _check(x, y)
    fold, n_folds = group_codes(folds)
    if n_folds < 2:
        raise ValueError(f"folds should name at least two parts (cases) to hold out in turn, got {n_folds}.")
    linear, nearest = y.copy(), y.copy()
    for held_out in range(n_folds):
        test, train = fold == held_out, fold != held_out
        kept = None if groups is None else groups[train]
        linear[test] = predict_linear(x[train], y[train], x[test], kept, seed)
        nearest[test] = predict_nearest(x[train], y[train], x[test])
    return _result(y, linear, nearest, groups, seed)


def predict_linear(
    train_x: FloatArray,
    train_y: Labels,
    test_x: FloatArray,
    train_groups: Labels | None = None,
    seed: int = 0,
) -> Labels:
    """Classes of `test_x` by `fit_linear` on the rest."""
    return fit_linear(train_x, train_y, train_groups, seed)(test_x)


def fit_linear(
    train_x: FloatArray, train_y: Labels, train_groups: Labels | None = None, seed: int = 0, C: float | None = None
) -> Callable[[FloatArray], Labels]:
    """Logistic regression on standardised features, by default with C from (grouped) 3-fold cross-validation.

    Classes weigh the same however many tiles they have, as balanced accuracy counts them so.

    Returns:
        From features to classes.
    """
    if len(np.unique(train_y)) < 2:
        raise ValueError("a probe needs at least two classes to train on, got one.")
    scaler = StandardScaler().fit(train_x)
    train = scaler.transform(train_x)
    model = fit_logistic(train, train_y, choose_c(train, train_y, train_groups, seed) if C is None else C)
    return lambda x: model.predict(scaler.transform(x))


def predict_nearest(train_x: FloatArray, train_y: Labels, test_x: FloatArray) -> Labels:
    """Classes by the vote of the 10 nearest training tiles (cosine; fewer if there are fewer).

    Votes weigh the same, and of classes with equally many the first in sorted order wins: scikit-learn's rule, by which
    UNI is evaluated too. On the quickstart it decides 1.5 % of tiles, and the last class in place of the first would
    move the balanced accuracy by .4 points, a tenth of its interval. (DINO's weights, exp(cos / .07), move it by .3.)
    """
    model = KNeighborsClassifier(min(NEIGHBOURS, len(train_x)), metric="cosine", algorithm="brute")
    # In double precision: cosines of a model with a large common part are too close for single.
    model.fit(train_x.astype(np.float64), train_y)
    predicted: Labels = model.predict(test_x.astype(np.float64))
    return predicted


def choose_c(x: FloatArray, y: Labels, groups: Labels | None, seed: int) -> float:
    """The C with the best mean balanced accuracy over the inner folds, the strongest penalty among equals."""
    inner = _inner_folds(y, groups, seed)
    if not inner:
        return C_GRID[len(C_GRID) // 2]
    scores = [
        np.mean(
            [
                balanced_accuracy_score(y[test], fit_logistic(x[train], y[train], C).predict(x[test]))
                for train, test in inner
            ]
        )
        for C in C_GRID
    ]
    return C_GRID[int(np.argmax(scores))]


def _inner_folds(y: Labels, groups: Labels | None, seed: int) -> list[tuple[IntArray, IntArray]]:
    """Stratified folds that keep groups together; none if some class has a single group."""
    units = np.arange(len(y)) if groups is None else groups
    rarest = min(len(np.unique(units[y == label])) for label in np.unique(y))
    if rarest < 2:
        return []
    n_splits = min(INNER_FOLDS, rarest)
    if groups is None:
        folds = StratifiedKFold(n_splits, shuffle=True, random_state=seed).split(y, y)
    else:
        folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed).split(y, y, groups)
    # Greedy grouped folds may still leave a fold without one of the classes; such a fold would mislead.
    n_classes = len(np.unique(y))
    return [
        (train, test) for train, test in folds if all(len(np.unique(y[part])) == n_classes for part in (train, test))
    ]


def fit_logistic(x: FloatArray, y: Labels, C: float) -> LogisticRegression:
    """Logistic regression on features that are standardised already, classes weighing the same."""
    with warnings.catch_warnings():
        # On separable classes a weak penalty converges slowly; stopping early is then one more regulariser.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, max_iter=300, class_weight="balanced").fit(x, y)


def _result(truth: Labels, linear: Labels, nearest: Labels, groups: Labels | None, seed: int) -> ProbeResult:
    units = np.arange(len(truth)) if groups is None else groups
    return ProbeResult(
        accuracy=balanced_accuracy(truth, linear),
        ci=balanced_accuracy_interval(truth, linear, units, seed),
        n=len(truth),
        knn10_accuracy=balanced_accuracy(truth, nearest),
        knn10_ci=balanced_accuracy_interval(truth, nearest, units, seed),
        n_groups=group_codes(units)[1],
        n_classes=len(np.unique(truth)),
    )


def balanced_accuracy(truth: Labels, predicted: Labels) -> float:
    """Mean recall over the classes that occur in `truth` (a class only ever predicted has no recall)."""
    return float(np.mean([(predicted[truth == label] == label).mean() for label in np.unique(truth)]))


def _check(x: FloatArray, y: Labels) -> None:
    if x.ndim != 2 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"features should have shape (n, d) with one class per row, got {x.shape} and {y.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinity: leave flagged tiles out before probing.")
