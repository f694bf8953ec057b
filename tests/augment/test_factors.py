"""Scanner factors: exactly nothing at 0, more with severity, one direction per seed, physics against oracles."""

import itertools
from typing import Any

import albumentations as A
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.augment import optics_math as optics
from pathokd.augment.factors import DEFAULT_PROBABILITIES, FACTORS, ScannerJitter
from pathokd.types import Rgb

STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


def distance(a: Rgb, b: Rgb) -> float:
    return float(np.sqrt(((a.astype(float) - b) ** 2).mean()))


@pytest.mark.parametrize("name", list(FACTORS))
def test_nothing_at_zero(name: str, tissue: Rgb, every_value: Rgb, odd_tile: Rgb) -> None:
    for image in (tissue, every_value, odd_tile):
        result = FACTORS[name].apply(image, 0.0, 1)
        assert np.array_equal(result, image)
        assert result is not image


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(FACTORS))
def test_more_with_severity(name: str, seed: int, tissue: Rgb) -> None:
    steps = [distance(FACTORS[name].apply(tissue, severity, seed), tissue) for severity in STEPS]
    assert steps[0] == 0
    assert all(a < b for a, b in itertools.pairwise(steps)), steps


@pytest.mark.parametrize("name", list(FACTORS))
def test_a_seed_is_one_direction_and_the_input_stays(name: str, tissue: Rgb) -> None:
    before = tissue.copy()
    factor = FACTORS[name]
    assert np.array_equal(factor.apply(tissue, 0.7, 5), factor.apply(tissue, 0.7, 5))
    assert np.array_equal(tissue, before)
    directed = {"psf blur", "defocus", "sharpening", "jpeg 2000"}
    others = {factor.apply(tissue, 0.7, seed).tobytes() for seed in range(8)}
    assert len(others) == 1 if name in directed else len(others) > 1


@pytest.mark.parametrize("name", list(FACTORS))
def test_odd_tiles_do_not_break(name: str, odd_tile: Rgb) -> None:
    result = FACTORS[name].apply(odd_tile, 1.0, 2)
    assert result.shape == odd_tile.shape
    assert result.dtype == np.uint8


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(set(FACTORS) - {"jpeg 2000"})),
    severity=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_any_image_any_severity(name: str, severity: float, seed: int, height: int, width: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    assert FACTORS[name].apply(image, severity, seed).shape == image.shape


# --------------------------------------------------------------------------------------------------------- optics


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.2])
def test_blur_is_a_gaussian_in_linear_light(sigma: float, tissue: Rgb) -> None:
    light = (tissue.astype(np.float64)) ** 2
    expected = np.sqrt(scipy.ndimage.gaussian_filter(light, (sigma, sigma, 0), mode="mirror", truncate=3.5))
    assert np.abs(optics.gaussian_blur(tissue, sigma) - expected).max() < 2.0
    assert np.abs(optics.gaussian_blur(tissue, sigma) - expected).mean() < 0.35


@pytest.mark.parametrize("radius", [0.3, 1.0, 1.7, 3.0])
def test_the_disc_of_confusion_has_its_moments(radius: float) -> None:
    kernel = optics.disc_kernel(radius).astype(np.float64)
    at = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel, kernel.T)
    # A disc has variance r^2 / 4 per axis; spreading its points over pixels adds at most 1/4.
    variance = float((kernel.sum(axis=0) * at**2).sum())
    assert radius**2 / 4 - 0.01 <= variance <= radius**2 / 4 + 0.26


def test_noise_has_the_variance_it_names() -> None:
    rng = np.random.default_rng(0)
    for value in (60, 128, 200):
        flat = np.full((300, 300, 3), value, np.uint8)
        noisy = optics.sensor_noise(flat, 6.0, 2.0, rng).astype(float)
        assert noisy.mean() == pytest.approx(value, abs=0.1)
        assert noisy.var() == pytest.approx(36 * value / 255 + 4 + 1 / 12, rel=0.03)  # 1/12: rounding


def test_greys_stay_grey_under_the_colour_matrix() -> None:
    greys = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[None, :, None], 3, axis=2)
    changed = optics.colour_matrix(greys, optics.hue_saturation(20.0, 1.3))
    assert np.abs(changed.astype(int) - greys).max() <= 1


def test_tone_and_gamma_keep_black_and_white() -> None:
    ends = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    for changed in (optics.tone_curve(ends, 0.8), optics.gamma(ends, 1.3)):
        assert np.array_equal(changed, ends)


def test_a_warm_lamp_is_warm() -> None:
    white = np.full((1, 1, 3), 220, np.uint8)
    warm, cold = (optics.illuminant(white, mired, residual=1.0)[0, 0].astype(int) for mired in (60.0, -60.0))
    assert warm[0] > warm[2]
    assert cold[0] < cold[2]
    with pytest.raises(ValueError, match="choose a shift of -114 to 96 mired"):
        optics.illuminant(white, 150.0)


def test_daylight_at_6504_kelvin_is_d65() -> None:
    assert optics.daylight_xy(6504) == pytest.approx((0.3127, 0.3290), abs=2e-4)  # CIE 15:2004, table T.3


def test_chromatic_shift_moves_red_and_blue_apart() -> None:
    image = np.full((40, 40, 3), 240, np.uint8)
    image[:, 18:22] = 60
    shifted = optics.chromatic_shift(image, 1.0)
    centre = [(255 - shifted[20, :, c].astype(float)) for c in range(3)]
    x = np.arange(40)
    means = [float(((c - c.min()) * x).sum() / (c - c.min()).sum()) for c in centre]
    assert means[0] - means[1] == pytest.approx(1.0, abs=0.1)
    assert means[2] - means[1] == pytest.approx(-1.0, abs=0.1)


def test_resampling_keeps_the_centre() -> None:
    image = np.full((101, 101, 3), 255, np.uint8)
    image[48:53, 48:53] = 0
    larger = optics.resample(image, 1.05)
    dark = np.argwhere(larger[..., 0] < 128)
    assert dark.mean(axis=0) == pytest.approx([50, 50], abs=0.1)


# ---------------------------------------------------------------------------------------------------------- jitter


def test_jitter_draws_a_stream(tissue: Rgb) -> None:
    one, two = (A.Compose([ScannerJitter((0.2, 0.6))], seed=seed) for seed in (1, 2))
    first, second = ([p(image=tissue)["image"].tobytes() for _ in range(5)] for p in (one, two))
    assert len(set(first)) == 5
    assert not set(first) & set(second)


def test_jitter_is_written_and_read_back(tissue: Rgb) -> None:
    one = A.Compose([ScannerJitter((0.1, 0.4), {"gamma": 1.0, "shot noise": 0.5})], seed=3)
    two: Any = A.from_dict(A.to_dict(one))
    for pipeline in (one, two):
        pipeline.set_random_seed(3)
    assert all(np.array_equal(one(image=tissue)["image"], two(image=tissue)["image"]) for _ in range(4))


def test_jitter_at_zero_is_the_image(tissue: Rgb) -> None:
    assert np.array_equal(ScannerJitter((0.0, 0.0))(image=tissue)["image"], tissue)
    assert np.array_equal(ScannerJitter((0.5, 0.5), {})(image=tissue)["image"], tissue)


def test_default_factors_exist() -> None:
    assert set(DEFAULT_PROBABILITIES) <= set(FACTORS)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: ScannerJitter((0.5, 1.5)), "severity must lie within 0 to 1"),
        (lambda: ScannerJitter((0.5, 0.1)), r"severity must be a range \[low, high\]"),
        (lambda: ScannerJitter(factors={"blur": 1.0}), "no scanner factor 'blur': choose from illuminant"),
        (lambda: FACTORS["gamma"].apply(np.zeros((4, 4, 3), np.uint8), -0.1, 0), "severity must lie within"),
        (lambda: FACTORS["gamma"].apply(np.zeros((4, 4)), 0.1, 0), "image must be uint8 of shape"),
    ],
)
def test_wrong_arguments(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()
