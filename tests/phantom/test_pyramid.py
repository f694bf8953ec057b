import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from pathokd.phantom import write_pyramid
from pathokd.types import Rgb


@pytest.fixture(scope="module")
def rgb() -> Rgb:
    noise = np.random.default_rng(0).normal(0, 1, (601, 803, 3)).astype(np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), 12)
    return np.clip(field * 900 + 150, 0, 255).astype(np.uint8)


def read(slide: openslide.OpenSlide, level: int = 0) -> np.ndarray:
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB")).astype(int)


@pytest.mark.parametrize("mpp", [0.25, 0.4545, 0.5])
def test_openslide_reads_pixels_levels_and_mpp(tmp_path: Path, rgb: Rgb, mpp: float) -> None:
    path = write_pyramid(tmp_path / "a.tif", rgb, mpp, quality=90)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(mpp, rel=1e-5)
        assert slide.level_dimensions == ((803, 601), (201, 150), (50, 38))
        assert np.abs(read(slide) - rgb).mean() < 3
        small = cv2.resize(rgb, (201, 150), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(read(slide, 1) - small).mean() < 3


def test_pyramid_that_is_not_quite_four(tmp_path: Path, rgb: Rgb) -> None:
    path = write_pyramid(tmp_path / "a.tif", rgb, 0.5, downsamples=(3.7, 7.9))
    with openslide.OpenSlide(path) as slide:
        np.testing.assert_allclose(slide.level_downsamples, [1, 3.7, 7.9], rtol=0.01)


def test_without_mpp(tmp_path: Path, rgb: Rgb) -> None:
    for flavour in ("generic-tiff", "aperio"):
        path = write_pyramid(tmp_path / f"{flavour}.tif", rgb, None, flavour=flavour)
        with openslide.OpenSlide(path) as slide:
            assert "openslide.mpp-x" not in slide.properties
            assert "openslide.objective-power" not in slide.properties


def test_aperio_style(tmp_path: Path, rgb: Rgb) -> None:
    path = write_pyramid(tmp_path / "a.svs", rgb, 0.499, flavour="aperio", objective=20)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.499)
        assert float(slide.properties["openslide.objective-power"]) == 20
        assert slide.level_count == 3
        assert np.abs(read(slide) - rgb).mean() < 3


def test_corrupt_tile_raises_and_others_are_read(tmp_path: Path, rgb: Rgb) -> None:
    path = write_pyramid(tmp_path / "a.tif", rgb, 0.5, corrupt=[(0, 1, 2)])
    with openslide.OpenSlide(path) as slide:
        assert slide.read_region((0, 0), 0, (256, 256)).size == (256, 256)
        with pytest.raises(openslide.OpenSlideError, match="JPEG"):
            slide.read_region((520, 300), 0, (64, 64))
    with openslide.OpenSlide(path) as slide:
        assert read(slide, 1).shape == (150, 201, 3)


def test_colour_profile_is_kept(tmp_path: Path, rgb: Rgb) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with openslide.OpenSlide(write_pyramid(tmp_path / "a.tif", rgb, 0.5, icc_profile=profile)) as slide:
        assert slide.color_profile is not None


def test_same_image_same_bytes(tmp_path: Path, rgb: Rgb) -> None:
    first, second = (write_pyramid(tmp_path / name, rgb, 0.5).read_bytes() for name in ("a.tif", "b.tif"))
    assert first == second


def test_imagecodecs_is_not_needed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "import numpy as np\n"
        "from pathokd.phantom import write_pyramid\n"
        f"write_pyramid({str(tmp_path / 'a.tif')!r}, np.full((300, 300, 3), 200, np.uint8), 0.5)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert np.abs(read(slide) - 200).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rgb": np.zeros((10, 10), np.uint8)}, "rgb must be"),
        ({"tile_px": 100}, "try 96"),
        ({"downsamples": (0.5,)}, "must exceed 1"),
        ({"corrupt": [(0, 9, 0)]}, "level 0 is 2 x 2 tiles"),
        ({"corrupt": [(7, 0, 0)]}, "level 7 is 0 x 0 tiles"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_pyramid(**{"path": tmp_path / "a.tif", "rgb": np.zeros((400, 400, 3), np.uint8), "mpp": 0.5, **changes})
    assert list(tmp_path.iterdir()) == []
