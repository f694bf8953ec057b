"""Indices by hand and by loop, and against the croma package: RI, MaRI and CRoMa."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pathokd.metrics.neighbours import Neighbours, typed_neighbours
from pathokd.metrics.robustness import (
    NeighbourCounts,
    indices,
    margin_index,
    neighbour_counts,
    robustness_index,
    robustness_margins,
    summarise_margins,
)

KS = [1, 3, 11, 25]


def cohort(
    seed: int, n: int = 240, dim: int = 16, biology: float = 1.0, place: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """Three classes in four centres, five tiles a slide; how far classes and centres are apart."""
    rng = np.random.default_rng(seed)
    bio, centre, slide = np.arange(n) // 5 % 3, np.arange(n) // 15 % 4, np.arange(n) // 5
    x = rng.normal(size=(n, dim)) + biology * rng.normal(size=(3, dim))[bio] + place * rng.normal(size=(4, dim))[centre]
    return torch.from_numpy(x).to(dtype), np.array(list("xyz"))[bio], np.array(list("ABCD"))[centre], slide


def manifest(bio: np.ndarray, centre: np.ndarray, slide: np.ndarray) -> pd.DataFrame:
    ids = [f"t{i}" for i in range(len(bio))]
    return pd.DataFrame({"sample_id": ids, "image_path": ids, "label": bio, "group_id": slide.astype(str), "c": centre})


def by_croma(name: str, method: str, x: torch.Tensor, frame: pd.DataFrame, **options: Any) -> Any:
    croma = pytest.importorskip("croma")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(getattr(croma, name), method)(x.numpy(), frame, confounder_column="c", **options)


CASES = [(0, 1.0, 1.0), (1, 2.0, 0.3), (2, 0.2, 2.0)]


@pytest.mark.parametrize(("seed", "biology", "place"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
def test_robustness_index_equals_croma(
    seed: int, biology: float, place: float, dtype: torch.dtype, tolerance: float
) -> None:
    x, *labels = cohort(seed, biology=biology, place=place, dtype=dtype)
    want = by_croma("RI", "compute_curve", x, manifest(*labels), k_values=KS)
    got = robustness_index(typed_neighbours(x, *labels, max(KS)), KS)
    assert [each.robustness for each in got] == pytest.approx([want[k] for k in KS], abs=tolerance)
    assert all(each.n == 240 for each in got)
    at_11 = by_croma("RI", "compute", x, manifest(*labels), k_candidates=[11])
    assert got[2].support == pytest.approx(at_11.support)


@pytest.mark.parametrize(("seed", "biology", "place"), CASES)
@pytest.mark.parametrize("tau", [None, 0.05, 3.0])
def test_mari_equals_croma(seed: int, biology: float, place: float, tau: float | None) -> None:
    x, *labels = cohort(seed, biology=biology, place=place)
    want = by_croma("MaRI", "compute", x, manifest(*labels), k_candidates=[11], tau=tau)
    got = margin_index(typed_neighbours(x, *labels, 20), 11, tau)
    assert got.value == pytest.approx(want.value, abs=1e-12)
    assert got.tau == pytest.approx(want.tau, abs=1e-12)
    share = (got.SO / (got.SO + got.OS)).numpy()
    np.testing.assert_allclose(share[np.isfinite(share)], want.sample_values, atol=1e-10)


@pytest.mark.parametrize(("seed", "biology", "place"), CASES)
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_croma_equals_croma(
    seed: int, biology: float, place: float, m: int, dtype: torch.dtype, tolerance: float
) -> None:
    x, *labels = cohort(seed, biology=biology, place=place, dtype=dtype)
    want = by_croma("CRoMa", "compute", x, manifest(*labels), m=m)
    got = robustness_margins(x, *labels, m, chunk=100)
    np.testing.assert_allclose(got.margin.numpy(), want.sample_values, atol=tolerance)
    assert got.median == pytest.approx(want.value, abs=tolerance)
    assert got.ltm10 == pytest.approx(want.ltm_alpha, abs=max(tolerance, 1e-4 * (dtype == torch.float32)))
    assert got.f0 == pytest.approx(want.f0, abs=1 / 240 if dtype == torch.float32 else 0)
    assert (got.n, got.reason) == (240, "")


def test_indices_by_hand() -> None:
    """Two tiles with 10 neighbours each; pooled SS 6, SO 8, OS 2, OO 4. Formulas of method.md C.4 on paper."""
    one = [torch.tensor(pair, dtype=torch.float64) for pair in ([4, 2], [3, 5], [1, 1], [2, 2])]
    got = indices(NeighbourCounts(10, *one))
    assert got.robustness == pytest.approx(8 / 10)
    assert got.de_jong == pytest.approx(14 / 8)
    assert got.confounder_insensitivity == pytest.approx(12 / 8)
    assert got.generalisation == pytest.approx((48 + 16) / (48 + 24))
    assert got.ood_performance == pytest.approx(8 / 12)
    assert got.id_performance == pytest.approx(6 / 8)
    assert got.shares == pytest.approx((0.3, 0.4, 0.1, 0.2))
    assert (got.k, got.n, got.support, got.reason) == (10, 2, 1.0, "")


def test_counts_are_whole_and_add_up() -> None:
    x, *labels = cohort(0)
    counts = neighbour_counts(typed_neighbours(x, *labels, 11), 7)
    torch.testing.assert_close(counts.SS + counts.SO + counts.OS + counts.OO, torch.full((240,), 7.0).double())
    # A bootstrap resamples rows: tiles of slide 0 twice as a resample of two slides.
    rows = torch.arange(5).repeat(2)
    assert indices(NeighbourCounts(7, *(count[rows] for count in counts[1:]))).n == 10


def test_more_biology_and_less_place_are_more_robust() -> None:
    low, high = (
        (robustness_index(typed_neighbours(x, *labels, 11), [11])[0].robustness, robustness_margins(x, *labels).median)
        for x, *labels in (cohort(0, biology=0.5, place=2.0), cohort(0, biology=2.0, place=0.2))
    )
    assert low[0] < 0.3
    assert high[0] > 0.9
    assert low[1] < 0 < high[1]


def test_a_collapsed_encoder_scores_chance_and_has_no_margin() -> None:
    _, bio, centre, slide = cohort(0)
    flat = torch.full((240, 768), 0.1)
    found = typed_neighbours(flat, bio, centre, slide, 11)
    got = robustness_index(found, [11])[0]
    # Of the other slides, (80 - 20) are SO and (60 - 20) are OS, for every tile.
    assert got.robustness == pytest.approx(60 / 100, abs=1e-6)
    mari = margin_index(found, 11)
    assert (mari.value, mari.tau) == (pytest.approx(0.6, abs=1e-6), 0.0)
    margins = robustness_margins(flat, bio, centre, slide)
    assert np.isnan(margins.median)
    assert margins.n == 0
    assert margins.reason == "240 of 240 tiles lack 5 SO and 5 OS neighbours at a distance"


def test_undefined_values_are_nan_with_a_reason() -> None:
    x, *labels = cohort(0)
    found = typed_neighbours(x, *labels, 3)
    only_same = torch.zeros_like(found.share)
    only_same[:, :, 0] = 1.0
    nothing = Neighbours(found.distance, only_same, 0.0)
    got = robustness_index(nothing, [3])[0]
    assert np.isnan(got.robustness)
    assert got.support == 0.0
    assert got.reason.endswith("robustness, generalisation, ood_performance")
    mari = margin_index(nothing, 3)
    assert np.isnan(mari.value)
    assert "no SO or OS neighbour among the 3 nearest" in mari.reason
    margins = robustness_margins(x, *labels, m=45)
    # 60 SO tiles less none of the own slide, but 40 OS: fewer than 45.
    assert (margins.n, margins.reason) == (0, "240 of 240 tiles lack 45 SO and 45 OS neighbours at a distance")


def test_tail_is_the_mean_up_to_the_tenth_percentile() -> None:
    got = summarise_margins(torch.arange(-2.0, 9.0, dtype=torch.float64), 5)
    # 11 values: the 10th percentile is the second, -1; the tail is -2 and -1; three of 11 are at most 0.
    assert (got.median, got.ltm10, got.f0) == pytest.approx((3.0, -1.5, 3 / 11))


@pytest.mark.parametrize("tau", [1e-4, 1e-9])
def test_sharp_weights_do_not_underflow(tau: float) -> None:
    x, *labels = cohort(0)
    found = typed_neighbours(x, *labels, 11)
    got = margin_index(found, 11, tau)
    assert 0.0 <= got.value <= 1.0


def test_errors_say_what_to_do() -> None:
    x, *labels = cohort(0)
    found = typed_neighbours(x, *labels, 5)
    with pytest.raises(ValueError, match="k should be 1 to 5, the neighbours that were looked up, got 6"):
        robustness_index(found, [6])
    with pytest.raises(ValueError, match=r"tau should be above 0, got 0\.0"):
        margin_index(found, 5, 0.0)
    with pytest.raises(ValueError, match="m should be at least 1"):
        robustness_margins(x, *labels, m=0)
    with pytest.raises(ValueError, match="occurs with one confounder"):
        robustness_margins(x, labels[0], np.full(240, "A"), labels[2])
