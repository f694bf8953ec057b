"""Intervals against a plain loop over resamples."""

import numpy as np
import pytest

from pathokd.evaluate.bootstrap import balanced_accuracy_interval, weighted_mean_interval
from pathokd.evaluate.resampling import Resampler, percentiles


def test_balanced_accuracy_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 8, 60)
    truth = np.array(["stroma", "tumour", "fat"])[rng.integers(0, 3, 60)]
    predicted = np.where(rng.random(60) < 0.7, truth, "stroma")
    draws = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=200)
    scores = []
    for times in draws:
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), t) for g, t in enumerate(times)])
        y, p = truth[rows], predicted[rows]
        scores.append(np.mean([(p[y == c] == c).mean() for c in np.unique(y)]))
    got = balanced_accuracy_interval(truth, predicted, groups, seed=5, resamples=200)
    assert got == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])), abs=1e-12)


def test_groups_widen_the_interval() -> None:
    """Sixteen copies of each observation add no information once copies are resampled together."""
    truth = np.tile(["a", "b"], 20)
    predicted = np.where(np.random.default_rng(0).random(40) < 0.8, truth, "none")
    alone = balanced_accuracy_interval(truth, predicted, np.arange(40), seed=0)
    copies = np.arange(40).repeat(16)
    together = balanced_accuracy_interval(truth.repeat(16), predicted.repeat(16), copies, seed=0)
    naive = balanced_accuracy_interval(truth.repeat(16), predicted.repeat(16), np.arange(640), seed=0)
    assert together == pytest.approx(alone, abs=1e-12)
    assert naive[1] - naive[0] < 0.5 * (together[1] - together[0])


def test_weighted_mean_covers_its_mean_and_is_reproducible() -> None:
    values = np.random.default_rng(0).random(200)
    groups, weights = np.arange(200) % 40, np.full(200, 0.5)
    low, high = weighted_mean_interval(values, weights, groups, seed=1)
    assert low < values.mean() < high
    assert (low, high) == weighted_mean_interval(values, weights, groups, seed=1)
    # Normal theory: half-width about 1.96 sd / sqrt(n) for independent values.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.35)


def test_one_group_gives_no_interval() -> None:
    """It came out as a point, (0.5, 0.5): certainty from a single slide."""
    truth, predicted, one = np.array(list("aabb")), np.array(list("abab")), np.zeros(4)
    assert np.isnan(balanced_accuracy_interval(truth, predicted, one, 0)).all()
    assert np.isnan(weighted_mean_interval(np.arange(4.0), np.ones(4), one, 0)).all()
    assert np.isnan(percentiles(Resampler(one).means(np.arange(4.0)))).all()
