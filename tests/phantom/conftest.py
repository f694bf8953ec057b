import pytest

from pathokd.phantom import Scene, make_scene


@pytest.fixture(scope="session")
def scene() -> Scene:
    """Every class in 240 microns."""
    return make_scene(7, 240.0, margin_um=15.0, region_um=80.0)
