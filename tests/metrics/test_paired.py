"""Pairs of conditions against an explicit 2n by 2n loop in float64, ties beyond the kept list, and collapse."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.metrics import cosine, knn_overlap, paired_hits, separation, unit_rows
from pathokd.metrics.conditions import compare_conditions, paired_memory
from pathokd.metrics.paired import PairScores, compare_pair, own_similarities
from pathokd.metrics.retrieval import chance


def draw(seed: int, n: int, dim: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def one_pair(a: torch.Tensor, b: torch.Tensor, k: tuple[int, ...] = (1, 3, 5, 10), **options: int) -> PairScores:
    (found,) = compare_conditions(["a", "b"], {"a": a, "b": b}.__getitem__, k, tiles=True, **options)
    return found


def brute(a: np.ndarray, b: np.ndarray, k: tuple[int, ...]) -> np.ndarray:
    """P(hit) of all 2n queries from the whole 2n by 2n matrix, entry by entry."""
    n = len(a)
    x = np.concatenate([a, b]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    hits = np.zeros((2 * n, len(k)))
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        s, g, t = x[i] @ x[partner], 0, 0
        for j in range(2 * n):
            if j not in (i, partner):
                g += x[i] @ x[j] > s + 1e-6
                t += abs(x[i] @ x[j] - s) <= 1e-6
        hits[i] = [min(max((each - g) / (t + 1), 0.0), 1.0) for each in k]
    return hits


def check(a: torch.Tensor, b: torch.Tensor, k: tuple[int, ...], chunk: int) -> PairScores:
    n, found, want = len(a), one_pair(a, b, k, chunk=chunk), brute(a.numpy(), b.numpy(), k)
    np.testing.assert_allclose(found.tiles.first_to_second.numpy(), want[:n], atol=1e-9)
    np.testing.assert_allclose(found.tiles.second_to_first.numpy(), want[n:], atol=1e-9)
    np.testing.assert_allclose(found.topk, want.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(found.first_to_second, want[:n].mean(axis=0), atol=1e-9)
    assert found.cosine == pytest.approx(float(cosine(a, b).double().mean()), abs=1e-6)
    assert found.separation == pytest.approx(float(separation(a, b)), abs=1e-6)
    np.testing.assert_allclose(found.tiles.cosine.numpy(), cosine(a, b).numpy(), atol=1e-6)
    assert float(found.tiles.separation.mean()) == found.separation
    return found


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 14),
    dim=st.integers(2, 6),
    k=st.sampled_from([(1,), (1, 3), (2, 1)]),
    noise=st.sampled_from([0.1, 0.5, 2.0]),
    chunk=st.sampled_from([1, 3, 100]),
)
def test_equals_brute_force(seed: int, n: int, dim: int, k: tuple[int, ...], noise: float, chunk: int) -> None:
    a = draw(seed, n, dim)
    check(a, a + noise * draw(seed + 1, n, dim) + 0.5, k, chunk)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(6, 24), k=st.integers(1, 5), chunk=st.sampled_from([2, 50]))
def test_ties_longer_than_the_kept_list(seed: int, n: int, k: int, chunk: int) -> None:
    """Signs in 2 or 3 dimensions leave 4 or 8 different rows: own ties reach far beyond the k that are kept."""
    dim = 2 + seed % 2
    check(draw(seed, n, dim).sign(), draw(seed + 1, n, dim).sign(), (1, k), chunk)


@pytest.mark.parametrize("chunk", [16, 300])
def test_equals_the_plain_reference(chunk: int) -> None:
    a = draw(0, 150, 24)
    b = a + 1.5 * draw(1, 150, 24)
    hits, found = paired_hits(a, b, 10), one_pair(a, b, chunk=chunk)
    torch.testing.assert_close(found.tiles.first_to_second[:, 3], hits.a_to_b)
    torch.testing.assert_close(found.tiles.second_to_first[:, 3], hits.b_to_a)
    assert found.topk == tuple(sorted(found.topk))
    assert 0 < found.topk[0] < found.topk[3] < 1
    assert (found.n, found.k, found.tied) == (150, (1, 3, 5, 10), hits.tied)


def test_identical_features_score_one() -> None:
    a = draw(0, 120, 16)
    found = one_pair(a, a.clone())
    assert found.topk == (1.0,) * 4
    assert found.cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "dim"), [(7, 3), (129, 384), (301, 768), (133, 5120)])
def test_constant_encoder_scores_chance(n: int, dim: int, dtype: torch.dtype) -> None:
    a = draw(1, 1, dim).repeat(n, 1).to(dtype)
    found = one_pair(a, a.clone(), (1, 10), chunk=64)
    assert found.topk == pytest.approx((chance(1, n), chance(10, n)), rel=1e-12)
    assert found.tied == 1.0
    assert found.separation == pytest.approx(0.0, abs=1e-6)


def test_shuffled_pairs_score_chance() -> None:
    a = draw(0, 400, 16)
    found = one_pair(a, a[torch.randperm(400, generator=torch.Generator().manual_seed(3))])
    # 800 queries: the sd of a share near p = 10 / 799 is sqrt(p / 800) = 0.004; identical copies add a distractor.
    assert found.topk[3] == pytest.approx(chance(10, 400), abs=0.02)
    assert found.separation == pytest.approx(0.0, abs=0.05)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 30.0, 300.0]))
def test_scale_and_order_do_not_matter(seed: int, scale: float) -> None:
    a = draw(seed, 40, 12)
    b = a + draw(seed + 1, 40, 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    want, got = one_pair(a, b), one_pair((scale * a)[order], (scale * b)[order])
    assert got.topk == pytest.approx(want.topk, abs=1e-12)
    assert got.cosine == pytest.approx(want.cosine, abs=1e-6)
    swapped = one_pair(b, a)
    assert swapped.first_to_second == pytest.approx(want.second_to_first, abs=1e-12)
    assert swapped.topk == pytest.approx(want.topk, abs=1e-12)


def test_tf32_and_autocast_left_by_training_do_not_matter() -> None:
    a = draw(0, 64, 96)
    b = a + 2 * draw(1, 64, 96)

    def measure() -> tuple[tuple[float, ...], float, list[float], float]:
        pair = one_pair(a, b)
        return pair.topk, pair.separation, paired_hits(a, b, 3).a_to_b.tolist(), float(knn_overlap(a, b))

    want = measure()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert measure() == want
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("held", [2, 3, 4, 20])
def test_every_pair_once_with_bounded_loads(held: int) -> None:
    names = list("abcdefg")
    features = {name: draw(7, 30, 8) + i * draw(i, 30, 8) for i, name in enumerate(names)}
    loads: list[str] = []

    def load(name: str) -> np.ndarray:
        loads.append(name)
        return features[name].numpy()

    found = {score[:2]: score for score in compare_conditions(names, load, (1, 5), held=held)}
    assert set(found) == set(itertools.combinations(names, 2))
    for (first, second), score in found.items():
        assert score.topk == pytest.approx(one_pair(features[first], features[second], (1, 5)).topk)
        assert score.tiles is None
    starts = range(0, 7, held - 1)
    # Each block and all that stand behind it; a last block of one has nobody left to meet.
    assert len(loads) == sum(7 - start for start in starts) - (starts[-1] == 6)
    assert len(loads) <= len(names) + len(names) ** 2 / (2 * held - 2)


def test_resuming_computes_what_is_left() -> None:
    features = {name: draw(i, 20, 6) for i, name in enumerate("abcd")}
    left = [("d", "b"), ("a", "c")]
    found = list(compare_conditions("abcd", features.__getitem__, (1,), pairs=left, held=2))
    assert {score[:2] for score in found} == {("b", "d"), ("a", "c")}


def test_a_subset_of_rows() -> None:
    features = {name: draw(i, 20, 6).numpy() for i, name in enumerate("ab")}
    index = np.array([3, 1, 17, 9, 12])
    (found,) = compare_conditions("ab", features.__getitem__, (1,), index=index)
    want = one_pair(*(torch.from_numpy(x[index]) for x in features.values()), (1,))
    assert found.n == 5
    assert found.topk == want.topk


def test_memory_maps_and_read_only_arrays_are_taken() -> None:
    a = draw(0, 12, 4).numpy()
    a.setflags(write=False)
    (found,) = compare_conditions("ab", lambda name: a if name == "a" else a[::1], (1,))
    assert found.topk == (1.0,)


def test_full_benchmark_fits_in_24_gib() -> None:
    for dim in (768, 1536, 2560):
        assert paired_memory(16_278, dim, conditions=91, held=91) < 24 * 2**30
    assert paired_memory(16_278, 768, conditions=91) == pytest.approx(0.63e9, rel=0.01)
    # Linear in n for a fixed chunk, once n is large.
    assert paired_memory(400_000, 768) < 2.01 * paired_memory(200_000, 768)


def test_errors_say_what_to_do() -> None:
    a, b = draw(0, 5, 3), draw(1, 5, 3)
    features = {"a": a, "b": b, "short": a[:4], "zero": a * torch.tensor([[1.0], [1], [0], [1], [1]])}
    features["nan"] = a.clone()
    features["nan"][4, 0] = torch.nan

    def run(names: list[str], k: tuple[int, ...] = (1,), **options: object) -> None:
        list(compare_conditions(names, features.__getitem__, k, **options))

    with pytest.raises(ValueError, match="at least two conditions"):
        run(["a"])
    with pytest.raises(ValueError, match="different names"):
        run(["a", "a"])
    with pytest.raises(ValueError, match=r"same tiles in the same order, but short has .*\(4, 3\) and .*\(5, 3\)"):
        run(["a", "short"])
    with pytest.raises(ValueError, match=r"zero has 1 of 5 rows .*row 2"):
        run(["a", "zero"])
    with pytest.raises(ValueError, match=r"nan has 1 of 5 rows .*row 4"):
        run(["a", "nan"])
    with pytest.raises(ValueError, match=r"k should be 1 to 9 \(2n - 1"):
        run(["a", "b"], (1, 10))
    with pytest.raises(ValueError, match="k should be 1 to 9"):
        run(["a", "b"], ())
    with pytest.raises(ValueError, match="held should be at least 2"):
        run(["a", "b"], held=1)
    with pytest.raises(ValueError, match="two different conditions"):
        run(["a", "b"], pairs=[("a", "c")])
    for index in (np.array([0, 0]), np.array([0, 5]), np.array([], dtype=int)):
        with pytest.raises(ValueError, match="index should list rows of a, each 0 to 4"):
            run(["a", "b"], index=index)
    own = own_similarities(unit_rows(a), 1)
    with pytest.raises(ValueError, match="own lists should keep 3"):
        compare_pair(unit_rows(a), unit_rows(b), own, own, (3,))
    with pytest.raises(ValueError, match="at least 2"):
        inspect.unwrap(compare_pair)(a[:1], b[:1], own, own, (1,))
