"""Pictures as arrays, for references of staining and tiles to simulate on."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pathokd.errors import StoreError
from pathokd.types import Rgb


def read_image(path: str | Path) -> Rgb:
    """An 8-bit RGB image, shape (height, width, 3), transparent pixels white.

    Raises:
        StoreError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as image:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
    except FileNotFoundError:
        raise StoreError(f"There is no image {path}: check the path.") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise StoreError(f"{path} is no readable picture ({error}): give a PNG, JPEG or TIFF.") from error
    return np.asarray(white.convert("RGB"))
