import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist

from pathokd.phantom.nuclei import FIBROBLAST, LYMPHOCYTE, NucleusKind, discs, stamp
from pathokd.phantom.sheet import Sheet, cell_field, lookup, scatter


def blank(side: int = 100, mpp: float = 0.25) -> Sheet:
    zero, half, clear, angle = (np.full((side, side), value, np.float32) for value in (0.0, 0.3, 0.0, 0.0))
    return Sheet(mpp, zero, half, clear, angle)


@given(seed=st.integers(0, 1000), spacing=st.floats(3.0, 12.0))
@settings(max_examples=15, deadline=None)
def test_scattered_cells_keep_their_distance_and_their_region(seed: int, spacing: float) -> None:
    weight = np.zeros((120, 160), np.float32)
    weight[20:100, 30:140] = 1.0
    at = scatter(np.random.default_rng(seed), weight, 0.5, spacing)
    assert len(at) > 1
    assert pdist(at).min() >= spacing
    assert np.all(lookup(weight, at, 0.5) > 0.5)


def test_many_rounds_pack_densely() -> None:
    # Random sequential packing of discs covers 0.547 of the plane (Feder 1980); eight rounds come close.
    at = scatter(np.random.default_rng(0), np.ones((400, 400), np.float32), 0.5, 6.0, rounds=8)
    assert 0.45 < len(at) * np.pi * 3.0**2 / 200.0**2 < 0.6


def test_cell_field_agrees_with_brute_force() -> None:
    points = np.random.default_rng(1).uniform(0, 30, (12, 2))
    field = cell_field(points, (60, 60), 0.5)
    y, x = np.mgrid[0:60, 0:60] * 0.5
    sure = np.sort(cdist(np.stack([x.ravel(), y.ravel()], 1), points), axis=1)
    np.testing.assert_allclose(field.first.ravel(), sure[:, 0], atol=0.3)
    np.testing.assert_allclose(field.second.ravel(), sure[:, 1], atol=0.3)


def test_windows_share_the_sheet() -> None:
    sheet = blank()
    sheet.window(slice(10, 20), slice(30, 40)).lay(np.ones((10, 10), np.float32), haematoxylin=0.7, eosin=0.1)
    assert sheet.haematoxylin[15, 35] == pytest.approx(0.7)
    assert sheet.haematoxylin[25, 35] == 0.0
    assert sheet.eosin[25, 35] == pytest.approx(0.3)


def test_nucleus_has_its_area_and_place() -> None:
    kind = NucleusKind(4.0, 0.0, (1.5, 1.5), (1.0, 1.0), lump=0.0, body=1.0, chromatin=0.0, membrane=0.0)
    sheet = blank(120)
    stamp(sheet, np.random.default_rng(0), kind, np.array([[14.0, 16.0]]), np.zeros(1, np.float32))
    rows, columns = np.nonzero(sheet.haematoxylin > 0.5)
    area = len(rows) * sheet.mpp**2
    assert area == pytest.approx(np.pi * 16, rel=0.06)
    assert (columns.mean() + 0.5) * sheet.mpp == pytest.approx(14.0, abs=0.1)
    assert (rows.mean() + 0.5) * sheet.mpp == pytest.approx(16.0, abs=0.1)
    assert np.ptp(columns) == pytest.approx(1.5 * np.ptp(rows), rel=0.1)


def test_nuclei_at_and_beyond_the_rim_are_cut_off() -> None:
    sheet = blank(40)
    at = np.array([[0.0, 0.0], [10.0, 5.0], [-50.0, 3.0], [90.0, 90.0]])
    stamp(sheet, np.random.default_rng(0), LYMPHOCYTE, at)
    assert sheet.haematoxylin[0, 0] > 0.3
    assert np.isfinite(sheet.haematoxylin).all()


def test_nuclei_on_the_finest_grid() -> None:
    """A long nucleus is wider than what is left of the noise tile there, which was a broadcast error of numpy's."""
    sheet = blank(400, 0.1)
    at = np.random.default_rng(0).uniform(18.0, 22.0, (20, 2))
    stamp(sheet, np.random.default_rng(1), FIBROBLAST, at)
    assert sheet.haematoxylin.max() > 0.3
    assert sheet.haematoxylin[0].max() == 0


def test_red_cells_displace_eosin() -> None:
    sheet = blank(60)
    discs(sheet, np.random.default_rng(0), np.array([[7.0, 7.0]]), 3.2, 0.4)
    assert sheet.blood.max() > 0.3
    assert sheet.eosin[28, 28] < 0.15
