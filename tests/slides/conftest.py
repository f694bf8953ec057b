"""Synthetic slides with known content, written with tifffile."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

Image = npt.NDArray[np.uint8]
WriteSlide = Callable[..., Path]


@pytest.fixture
def write_slide(tmp_path: Path) -> WriteSlide:
    """Write levels (finest first) as a tiled TIFF that OpenSlide reads as generic-tiff."""

    def write(
        levels: Sequence[Image] | Image,
        name: str = "slide.tif",
        mpp: float | None = 0.5,
        compression: str | None = "zlib",
        **kwargs: object,
    ) -> Path:
        path = tmp_path / name
        images = [levels] if isinstance(levels, np.ndarray) else list(levels)
        with tifffile.TiffWriter(path) as writer:
            for number, image in enumerate(images):
                facts: dict[str, object] = {"photometric": "rgb", "tile": (256, 256), "metadata": None}
                if mpp is not None:
                    facts |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
                writer.write(image, compression=compression, subfiletype=int(number > 0), **{**facts, **kwargs})
        return path

    return write


def _wave_average(start: npt.NDArray[np.float64], width: float, period: float) -> npt.NDArray[np.float64]:
    """Mean of cos(2 pi t / period) over [start, start + width], in closed form."""
    k = 2 * np.pi / period
    return (np.sin(k * (start + width)) - np.sin(k * start)) / (k * width)


@pytest.fixture(scope="session")
def waves() -> Callable[[float, float, float, tuple[int, int]], npt.NDArray[np.float64]]:
    """An image known everywhere: exact area averages over pixels of any size at any place, in level-0
    units."""

    def render(x: float, y: float, step: float, size: tuple[int, int]) -> npt.NDArray[np.float64]:
        across = _wave_average(x + step * np.arange(size[0]), step, 97.3)
        down = _wave_average(y + step * np.arange(size[1]), step, 71.9)
        red = 128 + 90 * np.broadcast_to(across, (size[1], size[0]))
        green = 128 + 90 * np.broadcast_to(down[:, None], (size[1], size[0]))
        return np.stack([red, green, 128 + 90 * across[None] * down[:, None]], axis=-1)

    return render


@pytest.fixture(scope="session")
def tissue_like() -> Image:
    """1200 x 1000 px of glass with a pink disc of radius 350 px at (500, 500)."""
    y, x = np.mgrid[:1000, :1200]
    image = np.full((1000, 1200, 3), 243, np.uint8)
    image[(x - 500) ** 2 + (y - 500) ** 2 < 350**2] = (200, 130, 175)
    return image


@pytest.fixture
def break_tile() -> Callable[[Path, int, int], None]:
    """Overwrite the compressed bytes of one tile with zeros."""

    def damage(path: Path, level: int, index: int) -> None:
        with tifffile.TiffFile(path) as file:
            page = file.pages[level]
            offset, count = page.dataoffsets[index], page.databytecounts[index]
        with open(path, "r+b") as raw:
            raw.seek(offset)
            raw.write(b"\0" * count)

    return damage
