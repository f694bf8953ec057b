"""Probes: right on separable data, at chance on noise, honest about groups, deterministic."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from pathokd.evaluate import cross_probe, linear_probe
from pathokd.evaluate.probes import predict_linear, predict_nearest


def blobs(seed: int, n: int, dim: int = 6, spread: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, dim))
    label = rng.integers(0, 3, n)
    return centres[label] + rng.normal(0, spread, (n, dim)), np.array(["fat", "stroma", "tumour"])[label]


def test_separable_classes_are_found() -> None:
    x, y = blobs(0, 150)
    test_x, test_y = blobs(1, 90)
    got = linear_probe(x, y, test_x, test_y, groups=np.arange(90) // 3, seed=0)
    assert got.accuracy > 0.95
    assert got.knn10_accuracy > 0.95
    assert got.ci[0] <= got.accuracy <= got.ci[1]
    assert (got.n, got.n_groups, got.n_classes) == (90, 30, 3)
    assert got == linear_probe(x, y, test_x, test_y, groups=np.arange(90) // 3, seed=0)


def test_noise_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 10)), rng.integers(0, 3, 300)
    got = cross_probe(x, y, folds=np.arange(300) % 3)
    assert got.accuracy == pytest.approx(1 / 3, abs=0.1)
    assert got.ci[0] < 1 / 3 < got.ci[1]


def test_scale_of_features_does_not_matter_to_the_linear_probe() -> None:
    x, y = blobs(0, 120)
    test_x, _ = blobs(1, 60)
    stretch = np.array([1e-3, 1e3, 1, 1, 1, 1])
    assert (predict_linear(x, y, test_x) == predict_linear(x * stretch, y, test_x * stretch)).all()


def test_nearest_equals_sklearn_on_unit_rows() -> None:
    """Cosine order is Euclidean order on the sphere, an independent path in scikit-learn."""
    x, y = blobs(0, 120, spread=1.5)
    test_x, test_y = blobs(1, 60, spread=1.5)
    unit, test_unit = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, test_x))
    want = KNeighborsClassifier(10, algorithm="kd_tree").fit(unit, y).predict(test_unit)
    got = predict_nearest(x, y, test_x)
    assert (got == want).all()
    assert 0.4 < balanced_accuracy_score(test_y, got) < 1.0


def test_nearest_are_told_apart_beside_a_large_common_part() -> None:
    """In single precision 62 % of these tiles got another class than in double."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    x = rng.standard_normal((400, 64)) + 3 * np.eye(64)[y] + 3000
    single = predict_nearest(x[:200].astype(np.float32), y[:200], x[200:].astype(np.float32))
    assert (single == predict_nearest(x[:200], y[:200], x[200:])).mean() > 0.95


def test_held_out_cases_expose_what_is_only_case_colour() -> None:
    """Features that encode the case alone: perfect within a case, useless in a new one."""
    case = np.arange(120) // 30
    y = np.array(["a", "b"])[np.arange(120) // 15 % 2]
    rng = np.random.default_rng(0)
    x = np.eye(8)[case * 2 + (y == "b")] + rng.normal(0, 0.05, (120, 8))
    leaky = cross_probe(x, y, folds=np.arange(120) % 4)
    honest = cross_probe(x, y, folds=case, groups=case)
    assert leaky.accuracy == 1.0
    assert honest.accuracy < 0.75


def test_a_class_with_one_group_needs_no_inner_folds() -> None:
    x, y = blobs(0, 60)
    y = y.astype("<U8")
    got = linear_probe(x, y, x, y, train_groups=y)
    assert got.accuracy > 0.9


def test_errors() -> None:
    x, y = blobs(0, 30)
    with pytest.raises(ValueError, match="at least two parts"):
        cross_probe(x, y, folds=np.zeros(30))
    with pytest.raises(ValueError, match="one class per row"):
        linear_probe(x, y[:-1], x, y)
    with pytest.raises(ValueError, match="two classes"):
        linear_probe(x, np.full(30, "fat"), x, y)
    x[3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        cross_probe(x, y, folds=np.arange(30) % 2)
