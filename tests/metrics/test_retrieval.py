"""Neighbour overlap against scikit-learn, paired top-k against brute force in float64, ties and collapse."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from pathokd.metrics import conditions_topk, knn_overlap, mean_topk, paired_hits, paired_topk


def draw(seed: int, n: int, dim: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def brute_topk(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Query by query in float64: rank by strict > with ties shared out, both directions."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    total = 0.0
    for own, other in ((a, b), (b, a)):
        for i, query in enumerate(own):
            s = query @ other[i]
            rest = [query @ x for j, x in enumerate(own) if j != i]
            rest += [query @ x for j, x in enumerate(other) if j != i]
            g = sum(x > s + 1e-6 for x in rest)
            t = sum(abs(x - s) <= 1e-6 for x in rest)
            total += min(max((k - g) / (t + 1), 0.0), 1.0)
    return total / (2 * len(a))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 14),
    dim=st.integers(2, 6),
    k=st.integers(1, 12),
    noise=st.sampled_from([0.1, 0.5, 2.0]),
    chunk=st.sampled_from([1, 3, 100]),
)
def test_topk_equals_brute_force(seed: int, n: int, dim: int, k: int, noise: float, chunk: int) -> None:
    a = draw(seed, n, dim)
    b = a + noise * draw(seed + 1, n, dim)
    assert float(paired_topk(a, b, k, chunk=chunk)) == pytest.approx(brute_topk(a.numpy(), b.numpy(), k), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 12), k=st.integers(1, 5), chunk=st.sampled_from([2, 50]))
def test_topk_with_many_exact_ties(seed: int, n: int, k: int, chunk: int) -> None:
    """Signs only: few distinct rows, so duplicates and ties everywhere."""
    a, b = draw(seed, n, 3).sign(), draw(seed + 1, n, 3).sign()
    want = brute_topk(a.numpy(), b.numpy(), k)
    assert float(paired_topk(a, b, k, chunk=chunk)) == pytest.approx(want, abs=1e-9)


def test_identical_features_score_one() -> None:
    a = draw(0, 300, 16)
    hits = paired_hits(a, a.clone(), 1)
    assert float(paired_topk(a, a.clone(), 1)) == 1.0
    assert hits.tied == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "dim"), [(7, 3), (129, 384), (301, 768), (257, 1536), (133, 5120)])
def test_constant_encoder_scores_chance(n: int, dim: int, dtype: torch.dtype) -> None:
    a = draw(1, 1, dim).repeat(n, 1).to(dtype)
    hits = paired_hits(a, a.clone(), 10)
    assert float(paired_topk(a, a.clone(), 10)) == pytest.approx(min(1.0, 10 / (2 * n - 1)), rel=1e-12)
    assert hits.tied == 1.0


def test_scale_does_not_matter_even_in_half_precision() -> None:
    """The published fp16 code gives 0.955 and then 0.0 as features grow; here length is no information."""
    a = draw(0, 64, 32)
    b = a + 0.3 * draw(1, 64, 32)
    want = float(paired_topk(a, b, 1))
    assert float(paired_topk((900 * a).half(), (900 * b).half(), 1)) == pytest.approx(want, abs=0.02)
    assert float(paired_topk(1e-20 * a, 1e15 * b, 1)) == want


def test_a_scanner_shift_hides_the_partner() -> None:
    """Tiles of one scanner sit closer to each other than to their partners: nothing is found."""
    a = torch.nn.functional.normalize(draw(0, 20, 8), dim=1)
    shift = torch.zeros(8)
    shift[0] = 50.0
    assert float(paired_topk(a + shift, a - shift, 10)) == 0.0
    assert float(paired_topk(a, a, 10)) == 1.0


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("k", [1, 10])
def test_knn_overlap_equals_sklearn(k: int, chunk: int) -> None:
    a = draw(0, 60, 12)
    b = a[:, :5] + 0.5 * draw(1, 60, 5)

    def sets(x: torch.Tensor) -> list[set[int]]:
        index = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x.numpy())
        return [set(row) for row in index.kneighbors(return_distance=False)]

    want = np.mean([len(p & q) / k for p, q in zip(sets(a), sets(b), strict=True)])
    assert float(knn_overlap(a, b, k, chunk=chunk)) == pytest.approx(want, abs=1e-12)


def test_knn_overlap_leaves_self_out_among_duplicates() -> None:
    a = draw(0, 6, 4).repeat(2, 1)
    # Every tile has one exact duplicate: that is its neighbour, in both models, and never the tile itself.
    assert float(knn_overlap(a, 3 * a, 1)) == 1.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_overlap_ignores_rotation_scale_and_order(seed: int, scale: float) -> None:
    a = draw(seed, 20, 6)
    rotation = torch.linalg.qr(draw(seed + 1, 6, 6)).Q
    assert float(knn_overlap(a, scale * a @ rotation, 5)) == pytest.approx(1.0)
    b, order = draw(seed + 2, 20, 6), torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert float(knn_overlap(a[order], b[order], 5)) == pytest.approx(float(knn_overlap(a, b, 5)))


def test_conditions_cover_every_pair_once() -> None:
    a = draw(0, 10, 4)
    pairs = conditions_topk({"AT2": a, "GT450": a + 0.1, "S60": -a}, k=3)
    assert [(p.first, p.second, p.n) for p in pairs] == [
        ("AT2", "GT450", 10),
        ("AT2", "S60", 10),
        ("GT450", "S60", 10),
    ]
    assert mean_topk(pairs) == pytest.approx(sum(p.topk for p in pairs) / 3)


def test_errors_say_what_to_do() -> None:
    a = draw(0, 5, 3)
    with pytest.raises(ValueError, match="1 to 4"):
        knn_overlap(a, a, 5)
    with pytest.raises(ValueError, match="k should be at least 1"):
        paired_topk(a, a, 0)
    with pytest.raises(ValueError, match="partners row by row"):
        inspect.unwrap(paired_hits)(a, a[:4])
    with pytest.raises(ValueError, match="at least two conditions"):
        conditions_topk({"S60": a})
    with pytest.raises(ValueError, match="at least one pair"):
        mean_topk([])
    with pytest.raises(ValueError, match="a has 1 of 5 rows"):
        paired_topk(torch.cat([a[:4], torch.zeros(1, 3)]), a)
