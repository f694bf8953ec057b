"""How far a classifier falls for the centre: training sets in which class and centre go together more and more.

From the first split, where every class comes from every centre alike, to the last, where they are tied as closely as
equal sizes allow, one probe after the other is trained on as many tiles and tested on the same tiles of other
slides, of the same centres (in-domain) and of centres never trained on (out-of-domain). The average performance drop
(APD) is what the confounded probes lose against the balanced one.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pathokd.metrics.confounded_split import Rows, cramers_v, deal_pools, sizes, split_counts, take
from pathokd.metrics.neighbours import Labels
from pathokd.types import FloatArray

STRENGTHS = tuple(float(C) for C in 10 ** np.linspace(-8, 4, 15))
"""Inverse L2 penalties tried."""


class ConfoundedAccuracy(NamedTuple):
    """Balanced accuracies of probes under rising confounding."""

    cramers_v: npt.NDArray[np.float64]
    """(splits,) between class and centre in the training tiles, from 0; mean over repetitions."""
    in_domain: npt.NDArray[np.float64]
    """(splits, repetitions)"""
    out_of_domain: npt.NDArray[np.float64] | None
    """(splits, repetitions), or None without such centres."""
    n_train: int
    """Tiles of a training set, the same in every split; mean over repetitions."""
    n_in_domain: int
    """Tiles tested; mean over repetitions."""
    n_out_of_domain: int


class PerformanceDrop(NamedTuple):
    """APD with its 95 % interval."""

    apd: float
    """Mean of acc_s / acc_0 - 1 over confounded splits: -0.1 is a tenth of the accuracy lost."""
    ci: tuple[float, float]
    """Over repetitions: how sure the draws of slides leave us. NaN where there is one only."""
    n: int
    """Repetitions, of all data sets together."""


def confounded_accuracy(
    features: FloatArray,
    bio: Labels,
    confounder: Labels,
    groups: Labels | None = None,
    *,
    out_of_domain: Sequence[str | int] = (),
    splits: int = 8,
    repetitions: int = 20,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> ConfoundedAccuracy:
    """Train and test probes under rising confounding.

    In each repetition slides are dealt anew to training, validation (one in ten of a class in a centre) and test
    (three in ten); each split takes as many training tiles of each cell as `split_counts` says, always from the
    front of one random order. The penalty is chosen on validation tiles of the training tiles' own mixture, as
    nobody who is confounded knows better. Classes and centres are tied in sorted order.

    Args:
        features: (n, d), used as they are; scale them before if need be.
        bio: (n,) biological class of each tile.
        confounder: (n,) centre or scanner of each.
        groups: (n,) slide of each, each of one centre, never on two sides; None takes each tile for itself.
        out_of_domain: Centres that are tested on only.
        splits: How many, with V rising in equal steps from 0.
        repetitions: Deals of slides, each with all splits.
        strengths: Inverse penalties C to choose from.
        seed: Of the deals.

    Returns:
        Accuracies: recall, averaged over centres and then over classes.

    Raises:
        ValueError: Labels that do not fit, features that are not finite, a class that a centre lacks, a group in two
            centres, fewer than three slides of a class in a centre, or numbers out of range.

    Reference:
        Koemen et al. 2025, "Towards Robust Foundation Models for Digital Pathology" (PathoROB), average performance
        drop. It has tables by hand for three data sets; these here are computed, and equal its own for two.
    """
    units = np.arange(len(features)) if groups is None else groups
    if features.ndim != 2 or any(column.shape != features.shape[:1] for column in (bio, confounder, units)):
        raise ValueError(f"features should be (n, d) with a class, a centre and a group per row, got {features.shape}.")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity: leave flagged tiles out before training on them.")
    if repetitions < 1 or not strengths:
        raise ValueError("there should be at least one repetition and one strength.")
    unknown = set(out_of_domain) - set(confounder.tolist())
    if unknown:
        raise ValueError(f"out_of_domain names centres without tiles: {sorted(unknown)}.")
    outside = np.isin(confounder, list(out_of_domain))
    inside = np.flatnonzero(~outside)
    _check_complete(bio[inside], confounder[inside])
    if groups is not None:
        _check_nested(groups, confounder)
    y = np.unique(bio, return_inverse=True)[1]
    z = np.unique(confounder, return_inverse=True)[1]
    scores, v = np.full((2, splits, repetitions), np.nan), np.empty((splits, repetitions))
    n_train, n_test = [], []
    for repetition in range(repetitions):
        rng = np.random.default_rng([seed, repetition])
        pools = deal_pools(bio[inside], confounder[inside], units[inside], rng)
        counts = split_counts(sizes(pools.train), splits)
        if not counts.any():
            raise ValueError(
                f"the smallest cell holds {int(sizes(pools.train).min())} training tiles of its class and centre, too "
                "few for balanced and confounded training sets of one size; leave the class or the centre out."
            )
        # The share of each training cell that the validation cells can match in every split.
        share = min(1.0, float((sizes(pools.validation) / counts.max(axis=0)).min()))
        test = inside[pools.test]
        for s in range(splits):
            train = inside[take(pools.train, counts[s])]
            validation = inside[take(pools.validation, np.ceil(share * counts[s] - 1e-9).astype(int))]
            probe = fit_probe(features[train], y[train], features[validation], y[validation], strengths)
            scores[0, s, repetition] = cell_accuracy(y[test], probe.predict(features[test]), z[test])
            if outside.any():
                predicted = probe.predict(features[outside])
                scores[1, s, repetition] = cell_accuracy(y[outside], predicted, z[outside])
            v[s, repetition] = cramers_v(counts[s])
        n_train.append(int(counts[0].sum()))
        n_test.append(len(test))
    return ConfoundedAccuracy(
        cramers_v=v.mean(axis=1),
        in_domain=scores[0],
        out_of_domain=scores[1] if outside.any() else None,
        n_train=round(float(np.mean(n_train))),
        n_in_domain=round(float(np.mean(n_test))),
        n_out_of_domain=int(outside.sum()),
    )


def performance_drops(accuracies: FloatArray) -> npt.NDArray[np.float64]:
    """APD of each repetition: mean over confounded splits of acc_s / acc_0, minus 1.

    Args:
        accuracies: (splits, repetitions), the balanced split first.

    Returns:
        Drops, shape (repetitions,); negative is worse.

    Raises:
        ValueError: Fewer than two splits, no repetition, or a balanced accuracy that is not above 0.

    Reference:
        Koemen et al. 2025 (PathoROB), average performance drop.
    """
    if accuracies.ndim != 2 or len(accuracies) < 2 or not accuracies.size or not np.isfinite(accuracies).all():
        raise ValueError(f"accuracies should be finite, (splits of 2 or more, repetitions), got {accuracies.shape}.")
    if accuracies[0].min() <= 0:
        raise ValueError("a drop is relative to the balanced split, whose accuracy should be above 0 and is not.")
    drops: npt.NDArray[np.float64] = (accuracies[1:] / accuracies[0]).mean(axis=0) - 1
    return drops


def average_performance_drop(*accuracies: FloatArray, compat: Literal["pathorob"] | None = None) -> PerformanceDrop:
    """APD over one data set or several, with an interval that leaves out how data sets differ.

    Each drop loses its data set's mean and gets the mean of all; what varies then is repetitions. The means cost
    degrees of freedom, n less the number of data sets.

    Args:
        accuracies: Per data set (splits, repetitions), the balanced split first.
        compat: `pathorob` divides by n - 1 and reads Student's t at n degrees of freedom, as published.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: No accuracies, or as in `performance_drops`.

    Reference:
        Loftus and Masson 1994, "Using confidence intervals in within-subject designs"; Koemen et al. 2025 (PathoROB).
    """
    if not accuracies:
        raise ValueError("an average needs the accuracies of one data set at least, got none.")
    drops = [performance_drops(each) for each in accuracies]
    everything = np.concatenate(drops)
    n, mean = len(everything), float(everything.mean())
    squares = float(sum(((each - each.mean()) ** 2).sum() for each in drops))
    divisor, degrees = (n - 1, n) if compat == "pathorob" else (n - len(drops), n - len(drops))
    if divisor < 1:
        return PerformanceDrop(mean, (float("nan"), float("nan")), n)
    half = float(student_t.ppf(0.975, degrees)) * np.sqrt(squares / divisor / n)
    return PerformanceDrop(mean, (mean - half, mean + half), n)


def fit_probe(
    train_x: FloatArray, train_y: Rows, validation_x: FloatArray, validation_y: Rows, strengths: Sequence[float]
) -> LogisticRegression:
    """Logistic regression with the penalty that serves the validation tiles best, the strongest among equals.

    Args:
        train_x: (m, d) features.
        train_y: (m,) classes.
        validation_x: (k, d) features.
        validation_y: (k,) classes.
        strengths: Inverse penalties C, strongest penalty first.

    Returns:
        The fitted probe.
    """
    best, best_score = None, -1.0
    for C in strengths:
        with warnings.catch_warnings():
            # A weak penalty on separable classes converges slowly; stopping early is then one more regulariser.
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe = LogisticRegression(C=C, random_state=0)
            with threadpool_limits(1):  # matrices this small are faster on one thread
                probe.fit(train_x, train_y)
        score = cell_accuracy(validation_y, probe.predict(validation_x), np.zeros_like(validation_y))
        if score > best_score:
            best, best_score = probe, score
    return best


def cell_accuracy(truth: Rows, predicted: Rows, centre: Rows) -> float:
    """Recall of each class in each centre, averaged over centres, then over classes: balanced in both."""
    right = truth == predicted
    recalls = [
        np.mean([right[(truth == c) & (centre == m)].mean() for m in np.unique(centre[truth == c])])
        for c in np.unique(truth)
    ]
    return float(np.mean(recalls))


def _check_complete(bio: Labels, confounder: Labels) -> None:
    classes, centres = np.unique(bio), np.unique(confounder)
    if len(classes) < 2 or len(centres) < 2:
        raise ValueError(
            f"confounding needs two classes in two centres to train on, got {len(classes)} classes and {len(centres)}."
        )
    for c in classes:
        missing = np.setdiff1d(centres, confounder[bio == c])
        if len(missing):
            raise ValueError(
                f"class {c!s} has no tiles in centre {missing[0]!s}, but a balanced split needs every class in every "
                "centre; leave one of them out."
            )


def _check_nested(groups: Labels, confounder: Labels) -> None:
    """Centres deal their slides each for itself: one in two centres might train in one and be tested in the other."""
    group, centre = (np.unique(column, return_inverse=True)[1] for column in (groups, confounder))
    pairs = np.unique(np.stack([group, centre], axis=1), axis=0)
    twice = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    if len(twice):
        row = int(np.flatnonzero(group == twice[0])[0])
        raise ValueError(
            f"{len(twice)} groups lie in two centres or more (the first is {groups[row]!s}), so their tissue would be "
            "both trained on and tested: take each group's tiles from one centre."
        )
