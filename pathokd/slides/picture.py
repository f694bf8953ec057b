"""Plain pictures (PNG, JPEG): a field of view somebody exported, read whole, one level, no resolution of its
own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pathokd.errors import SlideError
from pathokd.pictures import as_array
from pathokd.types import Rgb

SUFFIXES = (".png", ".jpg", ".jpeg")
"""File name endings read here."""


class PictureReader:
    """A picture held in memory, through the interface of `readers`.

    PNG and JPEG say dots per inch of a screen or printer, never microns, so mpp must be given. Transparent
    pixels are white.
    """

    def __init__(self, path: Path) -> None:
        try:
            with Image.open(path) as image:
                self.icc_profile: bytes | None = image.info.get("icc_profile")
                self._pixels = as_array(image)
        except ValueError as error:
            raise SlideError(f"{path}: {error}; export it as RGB.") from error
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise SlideError(f"{path} is no readable picture ({error}): export it again as PNG or JPEG.") from error
        self.vendor = "picture"
        self.dimensions: tuple[int, int] = (self._pixels.shape[1], self._pixels.shape[0])
        self.level_dimensions: tuple[tuple[int, int], ...] = (self.dimensions,)
        self.level_downsamples: tuple[float, ...] = (1.0,)
        self.properties: Mapping[str, str] = {}
        self.associated_images: tuple[str, ...] = ()

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb:
        """Pixels at `location`, white outside the picture; there is only level 0."""
        x, y = location
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        x0, y0 = max(x, 0), max(y, 0)
        inside = self._pixels[y0 : max(y + size[1], 0), x0 : max(x + size[0], 0)]
        out[y0 - y : y0 - y + inside.shape[0], x0 - x : x0 - x + inside.shape[1]] = inside
        return out
