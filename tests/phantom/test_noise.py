import numpy as np
import pytest

from pathokd.phantom.noise import curl, fibre_noise, noise_tile, smooth_noise, smoothstep


@pytest.mark.parametrize("scale_px", [1.0, 3.0, 10.0, 40.0])
def test_smooth_noise_has_unit_deviation(scale_px: float) -> None:
    field = smooth_noise(np.random.default_rng(0), (600, 700), scale_px)
    assert field.shape == (600, 700)
    assert field.dtype == np.float32
    assert abs(float(field.mean())) < 0.15
    assert 0.7 < float(field.std()) < 1.3


def test_smooth_noise_grows_smoother_with_scale() -> None:
    slopes = [
        float(np.abs(np.diff(smooth_noise(np.random.default_rng(1), (400, 400), scale), axis=1)).mean())
        for scale in (3.0, 9.0, 27.0)
    ]
    assert slopes[0] > 2 * slopes[1] > 4 * slopes[2]


def test_noise_tile_is_periodic() -> None:
    tile = noise_tile(np.random.default_rng(2), 2.0, 64)
    inner = np.abs(np.diff(tile, axis=0)).mean()
    seam = np.abs(tile[0] - tile[-1]).mean()
    assert 0.6 < seam / inner < 1.6
    assert float(tile.std()) == pytest.approx(1.0, abs=1e-4)


def test_fibres_vary_less_along_than_across() -> None:
    field = curl(np.random.default_rng(3), (300, 300), 0.5, 0.0)
    fibres = fibre_noise(noise_tile(np.random.default_rng(4), 1.5), field, 60.0, 4.0)
    gy, gx = np.gradient(fibres)
    along = np.abs(gx * np.cos(field.angle) + gy * np.sin(field.angle)).mean()
    across = np.abs(gy * np.cos(field.angle) - gx * np.sin(field.angle)).mean()
    assert across > 4 * along


def test_smoothstep_ends_and_falls() -> None:
    x = np.array([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=np.float32)
    np.testing.assert_allclose(smoothstep(x, 0.0, 1.0), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(smoothstep(x, 1.0, 0.0), [1, 1, 0.5, 0, 0])
