"""Fitting a profile: what a known profile did to tiles is found again, and nothing explodes on poor material."""

import numpy as np
import pytest

from pathokd.augment.fit import (
    colour_distance,
    fit_detail,
    fit_scanner_profile,
    spectrum_distance,
    transport,
)
from pathokd.augment.optics_math import gaussian_blur, sensor_noise, unsharp_mask
from pathokd.augment.scanner import ScannerProfile, get_profile
from pathokd.phantom import make_scene, render
from pathokd.types import Rgb

ROW_SUMS = ((1.12, -0.05, 0.0), (0.02, 0.9, 0.03), (0.0, 0.1, 1.05))


@pytest.fixture(scope="module")
def tiles() -> list[Rgb]:
    """Sixteen tiles of 160 px of one phantom."""
    image = render(make_scene(11, 340.0, margin_um=20.0, region_um=110.0), "HE", "S50")
    return [image[y : y + 160, x : x + 160] for y in range(0, 640, 160) for x in range(0, 640, 160)]


KNOWN = ScannerProfile("known", "", ROW_SUMS, (0.02, 0.03, 0.06))


def test_registered_colours_are_found_again(tiles: list[Rgb]) -> None:
    """By what the map does to other tiles: densities of tissue lie close to a plane, so entries trade off."""
    found = fit_scanner_profile(tiles[::2], [KNOWN.apply(tile) for tile in tiles[::2]], registered=True)
    truth, mapped = ([profile.apply(tile) for tile in tiles[1::2]] for profile in (KNOWN, found))
    before, after = (colour_distance(other, truth, registered=True) for other in (tiles[1::2], mapped))
    assert after < 0.12 * before
    assert np.array(found.od_offset) == pytest.approx(np.array(KNOWN.od_offset), abs=0.02)
    assert found.blur_px < 0.3
    assert found.sharpen < 0.15


def test_registration_may_be_off_by_two_pixels(tiles: list[Rgb]) -> None:
    shifted = [np.roll(KNOWN.apply(tile), (2, -1), axis=(0, 1)) for tile in tiles[::2]]
    found = fit_scanner_profile(tiles[::2], shifted, registered=True)
    truth, mapped = ([profile.apply(tile) for tile in tiles[1::2]] for profile in (KNOWN, found))
    before, after = (colour_distance(other, truth, registered=True) for other in (tiles[1::2], mapped))
    assert after < 0.4 * before


def test_unregistered_tiles_come_nearer(tiles: list[Rgb]) -> None:
    """Fitted on some tissue against other tissue under the known profile, tested on what was left out of both."""
    profile = get_profile("soft-warm")
    target = [profile.apply(tile, seed=i) for i, tile in enumerate(tiles)]
    order = np.random.default_rng(0).permutation(len(tiles))
    source, other, test = order[:6], order[6:12], order[12:]
    found = fit_scanner_profile([tiles[i] for i in source], [target[i] for i in other])
    left_out, truth = [tiles[i] for i in test], [target[i] for i in test]
    mapped = [found.apply(tile) for tile in left_out]
    assert colour_distance(mapped, truth) < 0.5 * colour_distance(left_out, truth)
    assert colour_distance(mapped, truth, registered=True) < 0.6 * colour_distance(left_out, truth, registered=True)
    assert spectrum_distance(mapped, truth) < 1.05 * spectrum_distance(left_out, truth)


@pytest.mark.parametrize("sigma", [0.6, 1.1])
def test_blur_is_found(sigma: float, tiles: list[Rgb]) -> None:
    blur, sharpen, read = fit_detail(tiles, [gaussian_blur(tile, sigma) for tile in tiles], registered=True)
    assert blur == pytest.approx(sigma, abs=0.15)
    assert sharpen == 0
    assert read < 0.5


def test_sharpening_is_found(tiles: list[Rgb]) -> None:
    soft = [gaussian_blur(tile, 0.8) for tile in tiles]
    blur, sharpen, _ = fit_detail(soft, [unsharp_mask(tile, 1.0) for tile in soft], registered=True)
    assert blur == 0
    assert sharpen == pytest.approx(1.0, abs=0.3)


def test_noise_is_found(tiles: list[Rgb]) -> None:
    rng = np.random.default_rng(5)
    quiet = [gaussian_blur(tile, 1.5) for tile in tiles]
    noisy = [sensor_noise(tile, 0.0, 4.0, rng) for tile in quiet]
    assert fit_scanner_profile(quiet, noisy, registered=True).read == pytest.approx(4.0, rel=0.2)


def test_transport_takes_one_covariance_to_the_other() -> None:
    rng = np.random.default_rng(0)
    a, b = (m @ m.T + 0.1 * np.eye(3) for m in rng.standard_normal((2, 3, 3)))
    matrix = transport(a, b)
    assert matrix @ a @ matrix == pytest.approx(b)
    assert matrix == pytest.approx(matrix.T)
    assert transport(a, a) == pytest.approx(np.eye(3))


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("value", [255, 128, 0])
def test_constant_tiles_change_nothing_much(value: int, registered: bool) -> None:
    flat = [np.full((64, 64, 3), value, np.uint8)] * 3
    found = fit_scanner_profile(flat, flat, registered=registered)
    assert np.array(found.od_matrix) == pytest.approx(np.eye(3), abs=0.05)
    assert np.abs(found.apply(flat[0]).astype(int) - flat[0]).max() <= 2


def test_a_profile_between_equals_is_next_to_nothing(tiles: list[Rgb]) -> None:
    found = fit_scanner_profile(tiles, tiles, registered=True)
    assert np.abs(found.apply(tiles[5]).astype(int) - tiles[5]).mean() < 0.5


@pytest.mark.parametrize("side", [16, 24, 32])
def test_small_tiles_are_not_sharper_for_being_small(side: int, tiles: list[Rgb]) -> None:
    """Rings of the spectrum that a small tile has no frequency in counted as empty: a blur of 4 px on equal tiles."""
    small = [tile[64 : 64 + side, 64 : 64 + side] for tile in tiles]
    found = fit_scanner_profile(small, tiles)
    assert found.blur_px < 1
    assert found.sharpen < 0.5
    assert spectrum_distance(small, tiles) < 0.4


def test_wrong_tiles(tiles: list[Rgb]) -> None:
    with pytest.raises(ValueError, match="source_tiles holds no tile"):
        fit_scanner_profile([], tiles)
    with pytest.raises(ValueError, match="must pair one by one"):
        fit_scanner_profile(tiles, tiles[:3], registered=True)
    with pytest.raises(ValueError, match="target_tiles must be uint8 RGB"):
        fit_scanner_profile(tiles, [tiles[0].astype(float)])
