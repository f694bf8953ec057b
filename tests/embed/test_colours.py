"""The colour space: against scikit-learn, whatever the parts, its signs, and its edges."""

import tracemalloc

import numpy as np
import pytest
from sklearn.decomposition import PCA

from pathokd.embed.colours import fit_colours


def features(n: int = 300, dim: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, dim)) * np.geomspace(8, 0.5, dim) @ rng.normal(size=(dim, dim)) + 1000).astype(
        np.float32
    )


def test_axes_are_those_of_scikit_learn() -> None:
    x = features()
    space = fit_colours(lambda: [x])
    pca = PCA(3, svd_solver="full").fit(x.astype(np.float64))
    np.testing.assert_allclose(space.mean, pca.mean_, rtol=1e-9)
    np.testing.assert_allclose(space.share, pca.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(np.abs((space.axes * pca.components_).sum(axis=1)), 1, rtol=1e-8)
    assert space.n_tiles == 300
    assert (space.axes[np.arange(3), np.abs(space.axes).argmax(axis=1)] > 0).all()


def test_parts_and_order_do_not_matter() -> None:
    """A folder gives the same colours however its tiles are spread over slides; an empty slide is no trouble."""
    x = features()
    whole = fit_colours(lambda: [x])
    parts = fit_colours(lambda: [x[200:], x[:0], x[:7], x[7:200]])
    good = np.ones(len(x), np.bool_)
    difference = whole.colours(x, good).astype(int) - parts.colours(x, good)
    assert np.abs(difference).max() <= 1
    np.testing.assert_allclose(parts.axes, whole.axes, atol=1e-8)


def test_percentiles_are_the_ends_of_the_scale() -> None:
    x = features()
    colours = fit_colours(lambda: [x]).colours(x, np.ones(len(x), np.bool_))
    for channel in colours.T:
        assert 0.01 <= (channel == 0).mean() <= 0.03
        assert 0.01 <= (channel == 255).mean() <= 0.03
    outlier = np.concatenate([x, np.full((1, x.shape[1]), 1e5, np.float32)])
    assert fit_colours(lambda: [outlier]).colours(outlier, np.ones(len(outlier), np.bool_))[:-1].std() > 40


def test_flagged_tiles_are_black_and_change_nothing() -> None:
    x = features()
    good = np.ones(len(x), np.bool_)
    good[::7] = False
    holed = x.copy()
    holed[~good] = np.nan
    space = fit_colours(lambda: [holed[good]])
    colours = space.colours(holed, good)
    assert (colours[~good] == 0).all()
    np.testing.assert_array_equal(colours[good], space.colours(x[good], np.ones(int(good.sum()), np.bool_)))


@pytest.mark.parametrize("x", [np.ones((5, 4)), np.ones((1, 4)), np.arange(6.0)[:, None], np.eye(2)])
def test_fewer_than_three_axes(x: np.ndarray) -> None:
    """Alike on an axis is grey there: no noise is stretched to colours."""
    space = fit_colours(lambda: [x])
    colours = space.colours(x, np.ones(len(x), np.bool_))
    assert np.isfinite(space.share).all()
    assert (colours[:, 2] == 128).all()


def test_nothing_has_no_colours() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        fit_colours(list)


def test_memory_is_12_bytes_a_tile() -> None:
    """It was several times 24, and for each slide eight times its stored features."""
    part = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float16)
    fit_colours(lambda: [part])
    peaks = []
    for repeats in (1, 40):
        tracemalloc.start()
        fit_colours(lambda times=repeats: [part] * times)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1.2 * 12 * 39 * len(part)
    assert peaks[0] < 8 * part.nbytes
