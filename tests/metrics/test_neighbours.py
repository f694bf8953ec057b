"""Typed neighbours against a loop over scikit-learn's full ranking, and what ties, groups and collapse do to them."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from pathokd.metrics.neighbours import TYPES, check_crossed, typed_neighbours


def cohort(seed: int, n: int = 60, dim: int = 8) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Features with some biology and some centre in them, two or three tiles a slide."""
    rng = np.random.default_rng(seed)
    bio, centre = np.arange(n) % 3, np.arange(n) // 3 % 2
    slide = np.char.add(np.char.add(centre.astype(str), "-"), (np.arange(n) // 6 // 2).astype(str))
    x = rng.normal(size=(n, dim)) + rng.normal(size=(3, dim))[bio] + rng.normal(size=(2, dim))[centre]
    return torch.from_numpy(x), np.array(["fat", "stroma", "tumour"])[bio], np.array(["A", "B"])[centre], slide


def kind(bio: np.ndarray, centre: np.ndarray, i: int, j: int) -> int:
    return TYPES.index(("S" if bio[i] == bio[j] else "O") + ("S" if centre[i] == centre[j] else "O"))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_equals_sklearn_without_the_own_slide(chunk: int) -> None:
    x, bio, centre, slide = cohort(0)
    found = typed_neighbours(x, bio, centre, slide, 12, chunk=chunk)
    distance, order = NearestNeighbors(n_neighbors=60, metric="cosine").fit(x.numpy()).kneighbors(x.numpy())
    for i in range(60):
        others = [(d, j) for d, j in zip(distance[i], order[i], strict=True) if slide[j] != slide[i]][:12]
        np.testing.assert_allclose(found.distance[i], [d for d, _ in others], atol=1e-12)
        np.testing.assert_array_equal(found.share[i].argmax(dim=1), [kind(bio, centre, i, j) for _, j in others])
    assert found.tied == 0.0
    torch.testing.assert_close(found.share.sum(dim=2), torch.ones(60, 12))
    assert set(found.share.unique().tolist()) == {0.0, 1.0}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 20), chunk=st.sampled_from([5, 100]))
def test_ties_share_their_ranks(seed: int, k: int, chunk: int) -> None:
    """Signs in three dimensions: duplicates everywhere; each rank holds the mixture of its tie."""
    _, bio, centre, slide = cohort(seed, 48)
    x = torch.from_numpy(np.sign(np.random.default_rng(seed).normal(size=(48, 3))))
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    found = typed_neighbours(x, bio, centre, slide, k, chunk=chunk)
    for i in range(48):
        others = [j for j in range(48) if slide[j] != slide[i]]
        s = np.round(unit[others] @ unit[i], 9)
        ranked = -np.sort(-s)[:k]
        for rank, value in enumerate(ranked):
            kinds = [kind(bio, centre, i, j) for j, near in zip(others, s, strict=True) if near == value]
            want = np.bincount(kinds, minlength=4) / len(kinds)
            np.testing.assert_allclose(found.share[i, rank], want, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 30.0, 300.0]), ties=st.booleans())
def test_order_and_scale_do_not_matter(seed: int, scale: float, ties: bool) -> None:
    x, bio, centre, slide = cohort(seed)
    x = x.sign() if ties else x
    order = np.random.default_rng(seed).permutation(60)
    want = typed_neighbours(x, bio, centre, slide, 9)
    got = typed_neighbours((scale * x)[order], bio[order], centre[order], slide[order], 9)
    torch.testing.assert_close(got.share, want.share[order])
    torch.testing.assert_close(got.distance, want.distance[order])
    assert got.tied == want.tied


@pytest.mark.parametrize("dim", [3, 768])
def test_a_constant_encoder_shows_the_mixture_of_its_gallery(dim: int) -> None:
    _, bio, centre, slide = cohort(0)
    found = typed_neighbours(torch.randn(1, dim).repeat(60, 1), bio, centre, slide, 5)
    assert found.tied == 1.0
    assert float(found.distance.max()) == 0.0
    for i in range(60):
        kinds = [kind(bio, centre, i, j) for j in range(60) if slide[j] != slide[i]]
        want = torch.tensor(np.bincount(kinds, minlength=4) / len(kinds), dtype=torch.float32)
        torch.testing.assert_close(found.share[i], want.repeat(5, 1))


def test_close_cosines_of_a_model_with_a_large_common_part_are_still_ordered() -> None:
    """All cosines above 0.99999: fp32 would leave nothing but ties."""
    x, bio, centre, slide = cohort(0)
    far = torch.cat([x, torch.full((60, 1), 2000.0, dtype=x.dtype)], dim=1)
    found = typed_neighbours(far, bio, centre, slide, 9)
    assert found.tied == 0.0
    assert set(found.share.unique().tolist()) == {0.0, 1.0}


def test_without_groups_each_tile_is_its_own() -> None:
    x, bio, centre, _ = cohort(0)
    assert typed_neighbours(x, bio, centre, None, 59).share.shape == (60, 59, 4)


def test_errors_say_what_to_do() -> None:
    x, bio, centre, slide = cohort(0)
    largest = np.unique(slide, return_counts=True)[1].max()
    with pytest.raises(ValueError, match=f"k should be 1 to {60 - largest}, the gallery .* of 60 tiles, got 60"):
        typed_neighbours(x, bio, centre, slide, 60)
    with pytest.raises(ValueError, match="k should be 1 to"):
        typed_neighbours(x, bio, centre, slide, 0)
    with pytest.raises(ValueError, match=r"bio should have one label for each of the 60 tiles, got shape \(59,\)"):
        typed_neighbours(x, bio[1:], centre, slide)
    with pytest.raises(ValueError, match=r"class fat occurs with one confounder .* only \(A\)"):
        typed_neighbours(x, bio, np.full(60, "A"), slide)
    lonely = np.where((bio == "fat") & (centre == "B"), "stroma", bio)
    with pytest.raises(ValueError, match=r"class fat occurs with one confounder \(centre or scanner\) only \(A\)"):
        check_crossed(lonely, centre)
    with pytest.raises(ValueError, match=r"confounder C occurs with one class only \(fat\)"):
        check_crossed(np.append(bio, "fat"), np.append(centre, "C"))
    with pytest.raises(ValueError, match="1 of 60 rows"):
        typed_neighbours(torch.cat([x[:59], torch.zeros(1, 8, dtype=x.dtype)]), bio, centre, slide)
    with pytest.raises(ValueError, match="1 of 60 rows"):
        typed_neighbours(torch.cat([x[:59], torch.full((1, 8), torch.nan, dtype=x.dtype)]), bio, centre, slide)
    with pytest.raises(ValueError, match="got none"):
        inspect.unwrap(typed_neighbours)(x[:0], bio[:0], centre[:0], slide[:0])
