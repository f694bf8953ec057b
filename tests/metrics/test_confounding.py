"""Confounded splits against the published tables and SciPy, probes and APD against croma, and rising confounding."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats.contingency import association

from pathokd.metrics.confounded_split import coupling, cramers_v, deal_pools, sizes, split_counts, take
from pathokd.metrics.confounding import (
    STRENGTHS,
    average_performance_drop,
    cell_accuracy,
    confounded_accuracy,
    fit_probe,
    performance_drops,
)


def cohort(
    biology: float, place: float, centres: int = 2, slides: int = 8, tiles: int = 4, dim: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two classes; each slide of a centre holds tiles of one class."""
    rng = np.random.default_rng(0)
    n = 2 * centres * slides * tiles
    bio, centre, slide = np.arange(n) // tiles % 2, np.arange(n) // (2 * tiles) % centres, np.arange(n) // tiles
    x = rng.normal(size=(n, dim))
    x[:, 0] += biology * (2 * bio - 1)
    x[:, 1] += place * (2 * (centre % 2) - 1)
    return x, np.array(["normal", "tumour"])[bio], np.array(list("ABCD"))[centre], slide


@pytest.mark.parametrize(("dataset", "classes", "base", "splits"), [("camelyon", 2, 7, 8), ("tolkach_esca", 6, 3, 4)])
def test_counts_equal_the_published_tables(dataset: str, classes: int, base: int, splits: int) -> None:
    """PathoROB's schedule in slides, up to which centre comes first: at most 14 or 6 of a class in a centre."""
    probe = pytest.importorskip("croma.downstream.probe")
    got = split_counts(np.full((classes, 2), 2 * base), splits)
    for s, (cells, _) in enumerate(probe.pathorob_schedule(dataset, rows_per_slide=1)):
        table = np.zeros((classes, 2), dtype=int)
        for centre, c, count in cells:
            table[c, 1 - centre] = count
        np.testing.assert_array_equal(got[s], table)


def test_ends_equal_the_published_table_of_four_by_four() -> None:
    got = split_counts(np.full((4, 4), 8), 7)
    np.testing.assert_array_equal(got[0], np.full((4, 4), 2))
    np.testing.assert_array_equal(got[-1], 8 * np.eye(4, dtype=int))


@settings(max_examples=50, deadline=None)
@given(classes=st.integers(2, 6), centres=st.integers(2, 6), splits=st.integers(2, 9), seed=st.integers(0, 1000))
def test_counts_fit_and_confounding_rises(classes: int, centres: int, splits: int, seed: int) -> None:
    capacity = np.random.default_rng(seed).integers(40, 200, (classes, centres))
    counts = split_counts(capacity, splits)
    assert (counts <= capacity).all()
    assert (counts >= 0).all()
    assert (counts[0] == counts[0, 0, 0]).all()
    # Classes are equally large, in all splits; centres but for rounding.
    assert len(np.unique(counts.sum(axis=2))) == 1
    assert np.ptp(counts.sum(axis=1), axis=1).max() <= classes
    v = [cramers_v(table) for table in counts]
    assert v[0] == 0.0
    np.testing.assert_allclose(v, v[-1] * np.linspace(0, 1, splits), atol=0.06)
    assert (np.diff(v) > 0).all()
    if classes == centres:
        assert v[-1] == pytest.approx(1.0)


def test_all_of_a_cell_that_limits_is_used() -> None:
    # The diagonal needs twice the even share: 21 tiles allow 10 a cell.
    assert split_counts(np.array([[21, 90], [90, 30]]), 3)[0, 0, 0] == 10


def test_coupling_keeps_margins() -> None:
    np.testing.assert_allclose(coupling(4, 2), np.repeat(np.eye(2), 2, axis=0) / 4)
    np.testing.assert_allclose(coupling(3, 2), [[1 / 3, 0], [1 / 6, 1 / 6], [0, 1 / 3]])


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (6, 2)])
def test_cramers_v_equals_scipy(shape: tuple[int, int]) -> None:
    table = np.random.default_rng(0).integers(1, 40, shape)
    assert cramers_v(table) == pytest.approx(association(table, method="cramer"), abs=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_pools_share_no_slide_and_hold_every_class(mixed: bool) -> None:
    x, bio, centre, slide = cohort(1, 1)
    if mixed:  # slides with tiles of both classes
        slide = np.arange(len(x)) // 16 * 4 + np.arange(len(x)) % 4
    for seed in range(5):
        pools = deal_pools(bio, centre, slide, np.random.default_rng(seed))
        parts = [np.concatenate([rows for row in cells for rows in row]) for cells in pools[:2]] + [pools.test]
        assert sorted(np.concatenate(parts)) == list(range(len(x)))
        keys = [set(zip(centre[part], slide[part], strict=True)) for part in parts]
        assert len(keys[0] | keys[1] | keys[2]) == sum(map(len, keys))
        for part in parts:
            assert len(set(zip(bio[part], centre[part], strict=True))) == 4
        first = take(pools.train, np.ones((2, 2), dtype=int))
        assert list(bio[first]) == ["normal", "normal", "tumour", "tumour"]
        assert sizes(pools.train).sum() == len(parts[0])


@pytest.mark.parametrize("shape", [(2, 1), (4, 20), (8, 3)])
def test_drop_equals_croma(shape: tuple[int, int]) -> None:
    croma = pytest.importorskip("croma")
    accuracies = np.random.default_rng(0).uniform(0.4, 1.0, shape)
    assert average_performance_drop(accuracies).apd == pytest.approx(croma.apd(accuracies), abs=1e-12)
    assert performance_drops(accuracies).mean() == pytest.approx(croma.apd(accuracies), abs=1e-12)


def test_probe_equals_croma() -> None:
    reference = pytest.importorskip("croma.downstream._pathorob")
    x, bio, _, _ = cohort(0.4, 1.0, slides=20)
    y = np.unique(bio, return_inverse=True)[1]
    train, validation, test = (np.arange(part, len(x), 3) for part in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, C, (want,) = reference.train_logistic_regression(
            x[train], y[train], x[validation], y[validation], [x[test]], [y[test]]
        )
    probe = fit_probe(x[train], y[train], x[validation], y[validation], STRENGTHS)
    assert pytest.approx(C) == probe.C
    got = cell_accuracy(y[test], probe.predict(x[test]), np.zeros(len(test), dtype=int))
    assert got == pytest.approx(want, abs=1e-12)


def test_interval_leaves_out_differences_between_data_sets() -> None:
    rng = np.random.default_rng(0)
    sets = [np.stack([np.full(20, 0.9), 0.9 * (1 + level + 0.01 * rng.normal(size=20))]) for level in (-0.3, -0.1, 0.0)]
    found = average_performance_drop(*sets)
    drops = [performance_drops(each) for each in sets]
    assert found.n == 60
    assert found.apd == pytest.approx(np.mean(drops))
    # A one-way analysis of variance: residual variance within data sets, 57 degrees of freedom.
    half = stats.t.ppf(0.975, 57) * np.sqrt(sum(((d - d.mean()) ** 2).sum() for d in drops) / 57 / 60)
    assert found.ci == pytest.approx((found.apd - half, found.apd + half))
    assert half < 0.1 * stats.sem(np.concatenate(drops)) * 2
    # The published formula on corrected scores.
    corrected = np.concatenate([d - d.mean() + np.mean(drops) for d in drops])
    half = stats.t.ppf(0.975, df=60) * stats.sem(corrected)
    published = average_performance_drop(*sets, compat="pathorob")
    assert published.ci == pytest.approx((corrected.mean() - half, corrected.mean() + half))


def test_interval_of_one_data_set_is_students_and_of_one_repetition_unknown() -> None:
    accuracies = np.random.default_rng(1).uniform(0.5, 1.0, (3, 12))
    drops = performance_drops(accuracies)
    want = stats.t.interval(0.95, 11, loc=drops.mean(), scale=stats.sem(drops))
    assert average_performance_drop(accuracies).ci == pytest.approx(want)
    assert np.isnan(average_performance_drop(accuracies[:, :1]).ci).all()


def test_a_model_that_sees_the_centre_drops_and_a_blind_one_does_not() -> None:
    run = {"splits": 4, "repetitions": 3, "strengths": (1e-2, 1.0), "out_of_domain": ["C", "D"]}
    drops = {}
    for name, place in (("sees", 3.0), ("blind", 0.0)):
        x, *labels = cohort(1.0, place, centres=4, slides=12)
        found = confounded_accuracy(x, *labels, **run)
        assert found.cramers_v == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.03)
        assert found.in_domain.shape == (4, 3)
        assert found.n_out_of_domain == 2 * 2 * 12 * 4
        # 12 slides of a class in a centre: 4 tested, 1 validated, 7 trained on, so 14 of 4 tiles a class at most.
        assert (found.n_in_domain, found.n_train) == (4 * 4 * 4, 4 * 14)
        drops[name] = average_performance_drop(found.in_domain).apd
    assert drops["sees"] < -0.1 < drops["blind"]


def test_same_seed_same_numbers_and_no_centres_outside() -> None:
    x, *labels = cohort(1.0, 1.0, slides=4)
    run = {"splits": 2, "repetitions": 2, "strengths": (1.0,)}
    a, b, c = (confounded_accuracy(x, *labels, **run, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.in_domain, b.in_domain)
    assert not np.array_equal(a.in_domain, c.in_domain)
    assert a.out_of_domain is None


def test_accuracy_balances_classes_and_centres() -> None:
    truth, centre = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 0])
    # Class 0: all three right in centre 0, none in centre 1; class 1 right. (0.5 + 1) / 2.
    assert cell_accuracy(truth, np.array([0, 0, 0, 1, 1]), centre) == pytest.approx(0.75)


def test_errors_say_what_to_do() -> None:
    x, bio, centre, slide = cohort(1.0, 1.0, slides=4)
    with pytest.raises(ValueError, match="two classes in two centres"):
        confounded_accuracy(x, bio, np.full(len(x), "A"), slide)
    lonely = np.where(centre == "B", "tumour", bio)
    with pytest.raises(ValueError, match="class normal has no tiles in centre B"):
        confounded_accuracy(x, lonely, centre, slide)
    with pytest.raises(ValueError, match=r"class normal has 1 slides in centre A.*pass finer groups"):
        confounded_accuracy(x, bio, centre, centre)
    with pytest.raises(ValueError, match=r"centres without tiles: \['Z'\]"):
        confounded_accuracy(x, bio, centre, slide, out_of_domain=["Z"])
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        confounded_accuracy(np.where(x > 2, np.nan, x), bio, centre, slide)
    with pytest.raises(ValueError, match="a class, a centre and a group per row"):
        confounded_accuracy(x, bio[1:], centre, slide)
    with pytest.raises(ValueError, match=r"1 groups lie in two centres or more \(the first is 0\)"):
        confounded_accuracy(x, bio, centre, np.where(slide == slide[centre == "B"][0], 0, slide))
    with pytest.raises(ValueError, match="at least one repetition"):
        confounded_accuracy(x, bio, centre, slide, repetitions=0)
    with pytest.raises(ValueError, match="needs 2 splits"):
        confounded_accuracy(x, bio, centre, slide, splits=1)
    with pytest.raises(ValueError, match="should be finite"):
        performance_drops(np.ones((1, 3)))
    with pytest.raises(ValueError, match="above 0"):
        performance_drops(np.array([[0.0], [1.0]]))
    with pytest.raises(ValueError, match="got none"):
        average_performance_drop()


def test_cells_too_small_for_training_sets_are_one_sentence() -> None:
    """They gave a division by zero and scikit-learn's words."""
    x = np.random.default_rng(0).standard_normal((12, 3))
    bio, centre = np.repeat(["a", "a", "b", "b"], 3), np.repeat(["s", "t", "s", "t"], 3)
    with pytest.raises(ValueError, match="the smallest cell holds 1 training tiles of its class and centre, too few"):
        confounded_accuracy(x, bio, centre, np.arange(12), splits=6, repetitions=2, strengths=(1.0,))
