"""Pictures as arrays: transparent pixels are white, and what Pillow would cut off is refused."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pathokd.errors import StoreError
from pathokd.types import Rgb

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def read_image(path: str | Path) -> Rgb:
    """An 8-bit RGB image, shape (height, width, 3), transparent pixels white.

    Raises:
        StoreError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as image:
            return as_array(image)
    except FileNotFoundError:
        raise StoreError(f"There is no image {path}: check the path.") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise StoreError(f"{path} is no readable picture ({error}): give a PNG, JPEG or TIFF.") from error


def as_array(image: Image.Image) -> Rgb:
    """A picture as an array, shape (height, width, 3), transparent pixels white.

    Raises:
        ValueError: its pixels have more than 8 bits a channel, which Pillow would cut off at 255.
    """
    if image.mode not in _MODES:
        raise ValueError(f"the picture holds pixels of the kind {image.mode}, expected 8 bits a channel, such as RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return np.asarray(white.convert("RGB"))
