"""Ridge regression from sums, against scikit-learn's from rows."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from pathokd.models.ridge import RIDGES, RidgeSums

DEVICE = torch.device("cpu")


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x far from zero and of unlike scales, one column a copy and one constant; y of x and noise; halves."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)) * [1, 10, 0.1, 1, 1, 0] + [100, 0, -3, 5, 0, 2]
    x[:, 4] = x[:, 3]
    y = x[:, :3] @ rng.normal(size=(3, 4)) / [1, 10, 0.1, 5] + 0.3 * rng.normal(size=(n, 4)) + 50
    return x, np.concatenate([y, np.full((n, 1), 7.0)], axis=1), rng.integers(0, 2, n)


def summed(x: np.ndarray, y: np.ndarray, half: np.ndarray) -> RidgeSums:
    sums = RidgeSums(x.shape[1], y.shape[1], DEVICE)
    for start in range(0, len(x), 7):
        for which in (0, 1):
            part = slice(start, start + 7)
            mine = half[part] == which
            sums.add(torch.from_numpy(x[part][mine]), torch.from_numpy(y[part][mine]), which)
    return sums


def fitted(x: np.ndarray, y: np.ndarray, ridge: float) -> Ridge:
    return Ridge(ridge * len(x) * x.var(0).mean(), solver="svd").fit(x, y)


@pytest.mark.parametrize("n", [12, 40, 500])
def test_it_is_the_regression_of_all_rows_by_the_ridge_that_halves_choose(n: int) -> None:
    x, y, half = rows(n)
    found = summed(x, y, half).solve()
    expected = fitted(x, y, found.ridge)
    np.testing.assert_allclose(found.weight, expected.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-7)
    errors = []
    for ridge in RIDGES:
        each = []
        for which in (0, 1):
            told = fitted(x[half == which], y[half == which], ridge).predict(x[half != which])
            left = y[half != which]
            each.append(
                np.mean(((told - left) ** 2).sum(0)[:4] / (left.var(0)[:4] * len(left)))
            )  # the fifth is constant
        errors.append(np.mean(each))
    assert found.ridge == RIDGES[int(np.argmin(errors))]
    assert found.explained == pytest.approx(1 - min(errors), abs=1e-8)


def test_few_rows_take_a_large_ridge_and_many_a_small_one() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(4000, 30)), rng.normal(size=(4000, 2))
    y, half = x[:, :2] + 3 * noise, np.arange(4000) % 2
    few, many = (summed(x[:n], y[:n], half[:n]).solve() for n in (30, 4000))
    assert few.ridge > many.ridge
    assert many.explained == pytest.approx(0.1, abs=0.03)


def test_tokens_that_do_not_vary_give_the_mean() -> None:
    x, y = torch.full((8, 3), 2.0), torch.arange(16.0).reshape(8, 2)
    sums = RidgeSums(3, 2, DEVICE)
    sums.add(x[:4], y[:4], 0)
    sums.add(x[4:], y[4:], 1)
    found = sums.solve()
    torch.testing.assert_close(x[0].double() @ found.weight.T + found.bias, y.double().mean(0))


def test_rows_of_one_half_are_refused() -> None:
    sums = RidgeSums(3, 2, DEVICE)
    sums.add(torch.randn(4, 3), torch.randn(4, 2), 1)
    with pytest.raises(ValueError, match="All rows of a ridge regression are in one half"):
        sums.solve()
