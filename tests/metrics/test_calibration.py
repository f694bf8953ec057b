"""Calibration error against torchmetrics and by hand, and the bins of the diagram."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from pathokd.metrics.calibration import calibration_error, classwise_calibration_error


def predictions(seed: int, n: int, classes: int, sharp: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = sharp * rng.normal(size=(n, classes))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p, np.array([rng.choice(classes, p=row) for row in p])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 60), classes=st.integers(2, 5), bins=st.sampled_from([1, 7, 10, 15]))
def test_equals_torchmetrics(seed: int, n: int, classes: int, bins: int) -> None:
    p, y = predictions(seed, n, classes)
    p = p.astype(np.float32)
    found = calibration_error(p, y, bins=bins)
    for norm, value in (("l1", found.ece), ("max", found.mce)):
        want = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(y), classes, n_bins=bins, norm=norm)
        assert value == pytest.approx(float(want), abs=1e-5)


def test_by_hand() -> None:
    """Two bins: 0.4 to 0.5 says 0.4 once, wrong; above says 0.6, 0.8 (right) and 1.0 (right), 0.6 wrong."""
    p = np.array([[0.4, 0.3, 0.3], [0.6, 0.4, 0.0], [0.8, 0.1, 0.1], [0.0, 1.0, 0.0]])
    found = calibration_error(p, np.array([1, 1, 0, 1]), bins=2)
    assert [b.n for b in found.bins] == [1, 3]
    assert found.bins[1][3:] == pytest.approx((0.8, 2 / 3))
    assert found.ece == pytest.approx(0.25 * 0.4 + 0.75 * (0.8 - 2 / 3))
    assert found.mce == pytest.approx(0.4)
    # 0.5 lies in the bin it ends: low < p <= high.
    assert [b.n for b in calibration_error(np.full((3, 2), 0.5), np.zeros(3, dtype=int), bins=2).bins] == [3, 0]


def test_calibrated_predictions_have_a_small_error_and_overconfident_ones_a_large() -> None:
    p, y = predictions(0, 20_000, 3)
    sharper = p**4 / (p**4).sum(axis=1, keepdims=True)
    for by in ("width", "mass"):
        assert calibration_error(p, y, by=by).ece < 0.02
        assert calibration_error(sharper, y, by=by).ece > 0.1
        assert classwise_calibration_error(p, y, by=by) < 0.02 < classwise_calibration_error(sharper, y, by=by)


def test_bins_of_equal_mass() -> None:
    p, y = predictions(1, 300, 4)
    found = calibration_error(p, y, bins=10, by="mass")
    assert [b.n for b in found.bins] == [30] * 10
    assert (found.bins[0].low, found.bins[-1].high) == (0.0, 1.0)
    # Every prediction alike: one bin, and empty ones that say nothing.
    same = calibration_error(np.full((8, 2), 0.5), np.array([0, 1] * 4), bins=5, by="mass")
    assert sorted(b.n for b in same.bins) == [0, 0, 0, 0, 8]
    assert same.ece == 0.0


def test_classwise_is_the_mean_of_binary_errors() -> None:
    p, y = predictions(2, 200, 3)
    each = []
    for c in range(3):
        which = np.clip(np.ceil(p[:, c] * 15).astype(int) - 1, 0, 14)
        parts = [np.flatnonzero(which == b) for b in range(15)]
        each.append(sum(abs((y[part] == c).sum() - p[part, c].sum()) for part in parts) / 200)
    assert classwise_calibration_error(p, y) == pytest.approx(np.mean(each), abs=1e-12)


def test_errors_say_what_to_do() -> None:
    p, y = predictions(0, 5, 3)
    with pytest.raises(ValueError, match=r"got \(5, 3\) and \(4,\)"):
        calibration_error(p, y[:4])
    with pytest.raises(ValueError, match="positions of classes, 0 to 2"):
        calibration_error(p, y + 3)
    with pytest.raises(ValueError, match="pass logits through a softmax"):
        calibration_error(3 * p, y)
    with pytest.raises(ValueError, match="sum to 1"):
        calibration_error(np.full((5, 3), np.nan), y)
    with pytest.raises(ValueError, match="bins should be at least 1"):
        classwise_calibration_error(p, y, bins=0)
