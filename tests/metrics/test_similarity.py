"""Cosine, separation and linear CKA against NumPy, and the invariances each must have."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.metrics import cosine, linear_cka, separation, unit_rows


def draw(seed: int, n: int, dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hsic_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel form of linear CKA: centred n x n Gram matrices, an independent road to the same number."""
    n = len(a)
    H = np.eye(n) - np.full((n, n), 1 / n)
    K, L = H @ (a @ a.T) @ H, H @ (b @ b.T) @ H
    return float(np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L)))


@pytest.mark.parametrize(("n", "dim_a", "dim_b"), [(2, 3, 5), (40, 8, 8), (30, 64, 7)])
def test_cka_equals_hsic(n: int, dim_a: int, dim_b: int) -> None:
    a = draw(0, n, dim_a)
    b = draw(1, n, dim_b) + 3.0
    b[:, :3] += a[:, :3]
    assert float(linear_cka(a, b)) == pytest.approx(hsic_cka(a.numpy(), b.numpy()), abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), shift=st.floats(-5, 5))
def test_cka_ignores_rotation_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    a, b = draw(seed, 25, 6), draw(seed + 1, 25, 4)
    rotation = torch.linalg.qr(draw(seed + 2, 6, 6)).Q
    before, after = float(linear_cka(a, b)), float(linear_cka(scale * a @ rotation + shift, b))
    assert after == pytest.approx(before, abs=1e-9)
    assert 0.0 <= before <= 1.0 + 1e-12


def test_cka_of_itself_is_one_and_of_a_constant_is_zero() -> None:
    a = draw(3, 20, 5, torch.float16)
    assert float(linear_cka(a, 7 * a.float())) == pytest.approx(1.0, abs=1e-9)
    constant = torch.full((20, 9), 0.1, dtype=torch.float32)
    assert float(linear_cka(a, constant)) == 0.0


def test_cka_survives_huge_and_tiny_features() -> None:
    a, b = draw(0, 20, 5), draw(1, 20, 5)
    assert float(linear_cka(1e120 * a, 1e-120 * b)) == pytest.approx(float(linear_cka(a, b)), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), dim=st.integers(1, 9))
def test_cosine_equals_numpy(seed: int, n: int, dim: int) -> None:
    a, b = draw(seed, n, dim), draw(seed + 1, n, dim)
    x, y = a.numpy(), b.numpy()
    want = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(cosine(a, b).numpy(), want, atol=1e-12)
    np.testing.assert_allclose(cosine(a.float(), b.float()).numpy(), want, atol=2e-6)


def test_half_precision_rows_do_not_overflow() -> None:
    """A row of norm 4 * 500 squares to infinity in fp16; its cosine with itself must still be 1."""
    a = torch.full((3, 16), 500.0, dtype=torch.float16)
    assert cosine(a, a).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert unit_rows(a).dtype == torch.float32


def test_separation_equals_brute_force_and_is_zero_when_collapsed() -> None:
    a, b = draw(0, 12, 5), draw(1, 12, 5)
    u, v = unit_rows(a).numpy(), unit_rows(b).numpy()
    all_pairs = u @ v.T
    want = np.diag(all_pairs).mean() - all_pairs[~np.eye(12, dtype=bool)].mean()
    assert float(separation(a, b)) == pytest.approx(want, abs=1e-12)
    flat = torch.ones(12, 5)
    assert float(separation(flat, flat)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_rows_without_direction_are_refused(bad: float) -> None:
    a = torch.ones(4, 3)
    a[2] = bad
    with pytest.raises(ValueError, match=r"1 of 4 rows .*the first is row 2"):
        cosine(a, torch.ones(4, 3))


def test_errors_name_shapes() -> None:
    # Past jaxtyping's own check, which has the first word when tests run with it.
    cosine_, cka_ = inspect.unwrap(cosine), inspect.unwrap(linear_cka)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        cosine_(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="4 and 5 rows"):
        cka_(torch.ones(4, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        linear_cka(torch.full((4, 3), torch.nan), torch.ones(4, 3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        separation(torch.ones(1, 3), torch.ones(1, 3))
