import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.slides import tissue_fraction, tissue_mask
from pathokd.slides.contours import FINE, mask_geojson, mask_polygons
from pathokd.slides.tissue import drop_small, fill_holes, is_brightfield

Image = npt.NDArray[np.uint8]
GLASS = (243, 243, 243)


def glass(height: int = 300, width: int = 400) -> Image:
    noise = np.random.default_rng(0).normal(0, 1.5, (height, width, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def with_disc(image: Image, colour: tuple[int, int, int], centre: tuple[int, int], radius: int) -> Image:
    out = image.copy()
    cv2.circle(out, centre, radius, colour, -1)
    return out


def test_empty_glass_is_empty() -> None:
    assert not tissue_mask(glass()).any()
    assert not tissue_mask(np.full((50, 50, 3), 255, np.uint8)).any()


@pytest.mark.parametrize(
    "colour",
    [(200, 130, 175), (120, 80, 140), (235, 215, 230), (206, 197, 203), (150, 110, 80), (190, 205, 215)],
    ids=["eosin", "haematoxylin", "pale", "grey IHC", "DAB", "blue IHC"],
)
def test_stained_disc_is_found(colour: tuple[int, int, int]) -> None:
    mask = tissue_mask(with_disc(glass(), colour, (200, 150), 80))
    truth = with_disc(np.zeros((300, 400, 3), np.uint8), (1, 1, 1), (200, 150), 80)[..., 0] > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.94


@pytest.mark.parametrize(
    "colour",
    [(40, 130, 110), (30, 50, 170), (215, 30, 40), (25, 22, 25), (220, 220, 220)],
    ids=["green", "blue", "red", "black", "shadow"],
)
def test_ink_and_shadow_are_no_tissue(colour: tuple[int, int, int]) -> None:
    image = with_disc(glass(), (200, 130, 175), (100, 150), 60)
    cv2.line(image, (250, 20), (330, 280), colour, 18)
    mask = tissue_mask(image)
    assert mask[100:200, 60:140].mean() > 0.8
    assert not mask[:, 230:].any()


def test_coverslip_edge_is_no_tissue() -> None:
    image = glass()
    cv2.line(image, (30, 0), (60, 299), (90, 90, 95), 1)
    assert not tissue_mask(image).any()


def test_field_full_of_tissue_is_full() -> None:
    rng = np.random.default_rng(0)
    image = np.clip(np.array((200, 130, 175)) + rng.normal(0, 12, (200, 200, 3)), 0, 255).astype(np.uint8)
    assert tissue_mask(image).all()


def test_determinism() -> None:
    image = with_disc(glass(), (200, 130, 175), (200, 150), 80)
    assert np.array_equal(tissue_mask(image), tissue_mask(image))


def test_resolution_hardly_matters() -> None:
    fine = with_disc(glass(1200, 1600), (200, 130, 175), (800, 600), 320)
    coarse = cv2.resize(fine, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    shares = tissue_mask(fine, 2.0).mean(), tissue_mask(np.asarray(coarse, np.uint8), 8.0).mean()
    assert shares[0] == pytest.approx(shares[1], rel=0.04)


def test_dark_field_is_no_brightfield() -> None:
    dark = np.zeros((100, 100, 3), np.uint8)
    dark[40:44, 40:44] = (0, 0, 255)
    assert not is_brightfield(dark)
    assert is_brightfield(glass())
    assert is_brightfield(np.full((10, 10, 3), (80, 40, 90), np.uint8))


def test_holes_at_the_border_stay_open() -> None:
    mask = np.ones((20, 20), bool)
    mask[5:8, 5:8] = False
    mask[0:3, 10:13] = False
    filled = fill_holes(mask, 100)
    assert filled[5:8, 5:8].all()
    assert not filled[0:3, 10:13].any()
    assert not fill_holes(mask, 5)[5:8, 5:8].any()
    assert not drop_small(~mask, 10).any()


@settings(deadline=None)
@given(seed=st.integers(0, 500), down=st.floats(1.0, 40.0), side=st.floats(5.0, 300.0))
def test_fraction_is_exact(seed: int, down: float, side: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 15)) > 0.5
    x, y = rng.integers(-50, 400, 4), rng.integers(-50, 400, 4)
    got = tissue_fraction(mask, x, y, mask_downsample=down, tile_level0=side)
    for i in range(4):
        across = np.clip(
            np.minimum((np.arange(15) + 1) * down, x[i] + side) - np.maximum(np.arange(15) * down, x[i]),
            0,
            None,
        )
        along = np.clip(
            np.minimum((np.arange(12) + 1) * down, y[i] + side) - np.maximum(np.arange(12) * down, y[i]),
            0,
            None,
        )
        assert got[i] == pytest.approx(along @ mask @ across / side**2, abs=1e-5)


def test_geojson_area_and_holes() -> None:
    mask = np.zeros((50, 60), bool)
    mask[10:40, 10:50] = True
    mask[20:30, 20:30] = False
    (rings,) = mask_polygons(mask)
    assert len(rings) == 2
    features = mask_geojson(mask, 16.0, (950, 800))["features"]
    (outline, hole) = features[0]["geometry"]["coordinates"]
    assert outline[0] == outline[-1]
    assert shoelace(outline) == pytest.approx(40 * 30 * 256, rel=0.03)
    assert shoelace(hole) == pytest.approx(10 * 10 * 256, rel=0.1)
    points = np.array(outline)
    half = 16 / FINE
    assert points.min(axis=0) == pytest.approx((160, 160), abs=half)
    assert points.max(axis=0) == pytest.approx((800, 640), abs=half)


def shoelace(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2
