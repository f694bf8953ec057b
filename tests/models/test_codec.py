"""Stored tokens: what each dtype and a rotation lose, against NumPy, scikit-learn and the stated bounds."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from pathokd.models.codec import SecondMoments, TokenCodec, fit_codec


def tokens(n: int = 300, dim: int = 12, seed: int = 0) -> torch.Tensor:
    """Correlated, off-centre, on scales that differ a thousandfold, with a few outliers."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim))
    x = mixed * np.logspace(-2, 1, dim) + rng.normal(0, 5, dim)
    x[::50] *= 8
    return torch.from_numpy(x).float()


def moments_of(x: torch.Tensor, parts: int = 3) -> SecondMoments:
    moments = SecondMoments(x.shape[-1])
    for part in x.chunk(parts):
        moments.update(part)
    return moments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 50), st.sampled_from([0.0, 1e4]))
def test_moments_are_those_of_all_rows(sizes: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, [1.0, 3.0, 0.1], (size, 3)) for size in sizes]
    moments = SecondMoments(3)
    for part in parts:
        moments.update(torch.from_numpy(part))
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-9)
    if len(rows) > 1:
        np.testing.assert_allclose(moments.covariance, np.cov(rows.T), rtol=1e-6, atol=1e-8)
    assert moments.count == len(rows)


def test_fp32_is_the_identity_and_fp16_half_a_unit_in_the_last_place() -> None:
    x = tokens()
    assert torch.equal(TokenCodec("fp32").decode(*TokenCodec("fp32").encode(x)), x)
    half = TokenCodec("fp16")
    codes = half.encode(x)
    assert codes.values.dtype == torch.float16
    assert bool(((half.decode(*codes) - x).abs() <= x.abs() * 2**-11 + 2**-25).all())
    with pytest.raises(ValueError, match="more than fp16 can"):
        half.encode(torch.full((1, 2), 1e5))


@pytest.mark.parametrize("components", [None, 5, 12])
def test_int8_keeps_every_component_to_half_a_step_of_its_token(components: int | None) -> None:
    """Also of tokens far outside of what the statistics were taken from: nothing is clipped."""
    codec = fit_codec("int8", moments_of(tokens()), components)
    for x in (tokens(), 100 * tokens(seed=3), torch.zeros(2, 12)):
        codes = codec.encode(x)
        assert codes.values.dtype == torch.int8
        z = TokenCodec("fp32", **codec.tensors()).encode(x).values
        read = codes.values.float() * codes.scale.unsqueeze(-1)  # type: ignore[union-attr]
        bound = z.abs().amax(-1, keepdim=True) / 254
        assert bool(((read - z).abs() <= bound * 1.001).all())
        assert float((read - z).abs().max()) > 0.2 * float(bound.max())  # the bound is no loose one


def test_a_full_rotation_loses_nothing_and_is_orthonormal() -> None:
    x = tokens()
    codec = fit_codec("fp32", moments_of(x), 12)
    torch.testing.assert_close(codec.decode(*codec.encode(x)), x, rtol=1e-4, atol=1e-3)
    assert codec.rotation is not None
    torch.testing.assert_close(codec.rotation.T @ codec.rotation, torch.eye(12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("components", [1, 4, 9])
def test_a_rotation_loses_what_scikit_learns_pca_loses(components: int) -> None:
    x = tokens()
    codec = fit_codec("fp32", moments_of(x), components)
    oracle = PCA(components, svd_solver="full").fit(x.numpy())
    read = codec.decode(*codec.encode(x))
    np.testing.assert_allclose(read, oracle.inverse_transform(oracle.transform(x.numpy())), rtol=1e-3, atol=2e-2)
    lost = float((read - x).double().square().sum()) / (len(x) - 1)
    whole = float(x.double().var(dim=0).sum())
    assert lost == pytest.approx(whole - float(oracle.explained_variance_.sum()), rel=1e-3, abs=1e-6 * whole)
    np.testing.assert_allclose(codec.std, np.sqrt(oracle.explained_variance_), rtol=1e-4)


def test_int8_after_a_rotation_is_within_the_sum_of_both_losses() -> None:
    """Per token: |x - x'| <= |what lies outside the kept directions| + |std| max |z| / 254."""
    x = tokens()
    codec = fit_codec("int8", moments_of(x), 6)
    exact = TokenCodec("fp32", **codec.tensors())
    outside = (exact.decode(*exact.encode(x)) - x).norm(dim=-1)
    rounding = codec.std.norm() * exact.encode(x).values.abs().amax(-1) / 254  # type: ignore[union-attr]
    assert bool(((codec.decode(*codec.encode(x)) - x).norm(dim=-1) <= (outside + rounding) * 1.001).all())


def test_a_component_that_never_varies_is_kept() -> None:
    x = torch.cat([tokens(dim=3), torch.full((300, 1), 4.0)], dim=1)
    codec = fit_codec("int8", moments_of(x))
    assert torch.allclose(codec.decode(*codec.encode(x))[:, 3], torch.tensor(4.0), atol=1e-5)


def test_directions_in_which_tokens_cannot_vary_take_no_bits() -> None:
    """Dimensions said twice: divided by the rounding of their eigenvalue, they were all that int8 saw."""
    x = tokens()
    twice = torch.cat([x, x[:, 6:] / 3], dim=1)
    codec = fit_codec("int8", moments_of(twice), 18)
    lost, plain = (
        float((code.decode(*code.encode(twice)) - twice).square().mean())
        for code in (codec, fit_codec("int8", moments_of(twice), 12))
    )
    assert lost < 2 * plain


@pytest.mark.parametrize("mean", [3.7, 0.0])
def test_a_dimension_that_only_rounds_takes_no_bits(mean: float) -> None:
    """One token of the sample differs by a unit in the last place; over that deviation another one would be 64."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = mean
    moments, later = SecondMoments(8), x.clone()
    x[0, 5] += 4e-7
    later[1:, 5] -= 4e-7
    moments.update(x)
    codec = fit_codec("int8", moments)
    lost = (codec.decode(*codec.encode(later)) - later)[:, :5]
    assert float(lost.norm() / later[:, :5].norm()) < 0.01
    assert codec.std is not None
    assert float(codec.std[5]) == 1


def test_the_sign_of_directions_is_settled() -> None:
    x = tokens()
    rotation = fit_codec("fp32", moments_of(x), 6).rotation
    assert rotation is not None
    assert bool((rotation.gather(0, rotation.abs().argmax(0, keepdim=True)) > 0).all())


def test_errors_say_what_fits(refuses: Any) -> None:
    with pytest.raises(ValueError, match="pca must lie in 1 to 12"):
        fit_codec("int8", moments_of(tokens()), 13)
    with pytest.raises(ValueError, match="pca must lie in 1 to 4 for tokens of width 12 and a sample of 5"):
        fit_codec("int8", moments_of(tokens(5)), 8)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "int4"}, "one of fp32, fp16, int8"),
        ({"dtype": "int8"}, "needs mean and std"),
        ({"dtype": "fp16", "mean": torch.zeros(2)}, "come together"),
        ({"dtype": "fp16", "mean": torch.zeros(2), "std": torch.zeros(2)}, "must be positive"),
    ]
    for arguments, words in wrong:
        with refuses(ValueError, words):
            TokenCodec(**arguments)
