import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathokd.phantom import SCANNERS, Scanner, Scene, render
from pathokd.phantom.scanner import develop, get_scanner, sampling


@given(st.floats(0.2, 0.4), st.floats(0.25, 4.0), st.floats(0.0, 0.8), st.floats(-0.2, 0.2))
def test_sampling_keeps_constants_and_positions(mpp_in: float, mpp_out: float, psf: float, shift: float) -> None:
    n_in, n_out = 400, int(400 * mpp_in / mpp_out)
    matrix = sampling(n_in, mpp_in, n_out, mpp_out, psf, shift)
    np.testing.assert_allclose(matrix @ np.ones(n_in), 1.0, rtol=1e-5)
    ramp = (np.arange(n_in) + 0.5) * mpp_in  # microns in, so the output reads off where it looked
    at = (np.arange(n_out) + 0.5) * mpp_out + shift
    far = (at > mpp_out + 4 * psf + 2) & (at < n_in * mpp_in - mpp_out - 4 * psf - 2)
    np.testing.assert_allclose((matrix @ ramp)[far], at[far], atol=0.03)


def test_sampling_does_not_alias() -> None:
    wave = np.sin(2 * np.pi * np.arange(800) * 0.25 / 1.1)  # period 1.1 um, sampled at 1 um: beyond Nyquist
    assert np.abs((sampling(800, 0.25, 200, 1.0, 0.25) @ wave)[5:-5]).max() < 0.1


@pytest.mark.parametrize("other", ["S45", "S55", "S25"])
@pytest.mark.parametrize("stain", ["HE", "violet", "pale"])
def test_scanners_and_stainings_are_registered(scene: Scene, other: str, stain: str) -> None:
    """The same microns show the same structure: sub-pixel shift, and correlated content."""
    reference = render(scene, "HE", "S50")
    image = render(scene, stain, other)
    mpp = SCANNERS[other].mpp
    y, x = np.mgrid[0:460, 0:460].astype(np.float32)
    at = [(axis + 0.5) * 0.5 / mpp - 0.5 for axis in (x, y)]  # centres of 0.5 um pixels on the other's grid
    moved = cv2.remap(image, at[0].astype(np.float32), at[1].astype(np.float32), cv2.INTER_LINEAR)
    a, b = (picture[:460, :460, 1].astype(np.float64) for picture in (reference, moved))
    (dx, dy), peak = cv2.phaseCorrelate(a, b, cv2.createHanningWindow((460, 460), cv2.CV_64F))
    assert abs(dx) < 0.2
    assert abs(dy) < 0.2
    assert peak > 0.4
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.93


def test_conditions_differ_to_the_eye(scene: Scene) -> None:
    pairs = [(stain, scanner) for stain in ("HE", "violet") for scanner in ("S50", "S45")]
    means = [render(scene, *pair).mean(axis=(0, 1)) for pair in pairs]
    for i, a in enumerate(means):
        for b in means[i + 1 :]:
            assert np.abs(a - b).max() > 6


def test_size_follows_the_scanner(scene: Scene) -> None:
    assert render(scene, "HE", "S50").shape == (480, 480, 3)
    assert render(scene, "HE", "S45").shape == (528, 528, 3)
    assert render(scene, "HE", "S50", mpp=2.0).shape == (120, 120, 3)


def test_glass_has_the_scanner_s_white() -> None:
    clear = np.ones((64, 64, 3), np.float32)
    for scanner in SCANNERS.values():
        image = develop(clear, scanner, np.random.default_rng(0))
        np.testing.assert_allclose(image.mean(axis=(0, 1)), scanner.white, atol=1.0)


def test_neutral_scanner_is_the_tone_curve() -> None:
    plain = Scanner("t", white=(255, 255, 255), flare=0.0, sharpen=0.0, shot=0.0, read=0.0)
    light = np.linspace(0.01, 1, 50, dtype=np.float32)[:, None, None].repeat(3, 2)
    expected = np.rint(255 * light ** (1 / 2.2))
    np.testing.assert_allclose(develop(light, plain, np.random.default_rng(0)), expected, atol=1)


def test_another_exposure_changes_noise_only(scene: Scene) -> None:
    a, b = (render(scene, "HE", "S50", noise_seed=seed).astype(int) for seed in (0, 1))
    assert 0 < np.abs(a - b).mean() < 2
    quiet = dataclasses.replace(get_scanner("S50"), shot=0.0, read=0.0)
    np.testing.assert_array_equal(render(scene, "HE", quiet, noise_seed=0), render(scene, "HE", quiet, noise_seed=1))


def test_bad_scanners() -> None:
    with pytest.raises(ValueError, match="S50, S45"):
        get_scanner("Aperio")
    with pytest.raises(ValueError, match="mpp must lie in"):
        Scanner("t", mpp=0.0)
    with pytest.raises(ValueError, match="jpeg_quality"):
        Scanner("t", jpeg_quality=0)
