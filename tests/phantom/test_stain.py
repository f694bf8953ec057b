import dataclasses

import numpy as np
import pytest

from pathokd.phantom import STAININGS, Scene, Staining
from pathokd.phantom.stain import DISPLAY_GAMMA, RUIFROK_E, RUIFROK_H, get_staining, transmit


def patch(scene: Scene, h: float, e: float) -> Scene:
    shape = (8, 8)
    dyes = {"haematoxylin": np.full(shape, h, np.float32), "eosin": np.full(shape, e, np.float32)}
    return dataclasses.replace(scene, **dyes, blood=np.zeros(shape, np.float32))


def test_clear_glass_lets_all_light_through(scene: Scene) -> None:
    for staining in STAININGS.values():
        np.testing.assert_array_equal(np.stack(transmit(patch(scene, 0.0, 0.0), staining)), 1.0)


def test_densities_add(scene: Scene) -> None:
    """Beer-Lambert: light through two layers is the product of the light through each."""
    staining = Staining("t", h_gain=1.2, e_gain=0.8, h_haze=0.1)
    layers = ((0.4, 0.1), (0.2, 0.3), (0.6, 0.4))
    one, two, both = (np.stack(transmit(patch(scene, *dyes), staining)) for dyes in layers)
    np.testing.assert_allclose(one * two, both, rtol=1e-5)


def test_unit_haematoxylin_has_display_density_one_along_its_vector(scene: Scene) -> None:
    plain = Staining("t", h_offset=(0.0, 0.0, 0.0), e_offset=(0.0, 0.0, 0.0))
    light = np.stack(transmit(patch(scene, 1.0, 0.0), plain))[:, 0, 0]
    vector = np.array(RUIFROK_H) / np.linalg.norm(RUIFROK_H)
    np.testing.assert_allclose(-np.log10(light) / DISPLAY_GAMMA, vector, rtol=1e-5)
    np.testing.assert_allclose(plain.matrix[1], np.array(RUIFROK_E) / np.linalg.norm(RUIFROK_E), rtol=1e-6)


def test_ladder_has_distinct_steps(scene: Scene) -> None:
    assert len(STAININGS) >= 4
    colours = [np.stack(transmit(scene, s)).mean(axis=(1, 2)) ** (1 / 2.2) * 255 for s in STAININGS.values()]
    for i, a in enumerate(colours):
        for b in colours[i + 1 :]:
            assert np.abs(a - b).max() > 4


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="HE, H-strong"):
        get_staining("H&E")


def test_absurd_gain_is_refused() -> None:
    with pytest.raises(ValueError, match="e_gain must lie in"):
        Staining("t", e_gain=-1.0)
