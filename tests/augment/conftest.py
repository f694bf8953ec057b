"""Tiles that look like tissue, with known dyes."""

import numpy as np
import pytest

from pathokd.phantom import make_scene, render
from pathokd.types import Rgb


@pytest.fixture(scope="session")
def tissue() -> Rgb:
    """A phantom tile of 224 px at 0.5 um/px with several tissues and some glass."""
    scene = make_scene(5, 150.0, margin_um=12.0, region_um=60.0)
    image = render(scene, "HE", "S50")
    return np.ascontiguousarray(image[:224, :224])


@pytest.fixture(scope="session")
def every_value() -> Rgb:
    """An image that holds each of the 256 values in each channel, in different company."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(np.tile(np.arange(256), 4)) for _ in range(3)], -1).reshape(32, 32, 3).astype("u1")


ODD = {
    "blank": np.full((40, 40, 3), 255, np.uint8),
    "nearly blank": np.random.default_rng(1).integers(243, 256, (40, 40, 3)).astype(np.uint8),
    "constant": np.full((40, 40, 3), (190, 120, 170), np.uint8),
    "black": np.zeros((40, 40, 3), np.uint8),
    "green pen": np.full((40, 40, 3), (40, 160, 70), np.uint8),
    "one pixel": np.full((1, 1, 3), (190, 120, 170), np.uint8),
    "one column": np.full((40, 1, 3), (190, 120, 170), np.uint8),
    "noise": np.random.default_rng(2).integers(0, 256, (40, 40, 3)).astype(np.uint8),
}


@pytest.fixture(params=ODD, ids=list(ODD))
def odd_tile(request: pytest.FixtureRequest) -> Rgb:
    """Tiles on which stain methods tend to fail."""
    return ODD[request.param].copy()
