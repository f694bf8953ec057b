"""Pictures as arrays: transparent pixels are white, and what Pillow would cut off is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
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


def stack_planes(images: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Pictures of one size as a model takes them.

    OpenCV takes channels apart ten times as fast as a copy of the transposed array.

    Args:
        images: each (height, width, 3), or each (count, height, width, 3), of one type.

    Returns:
        (n, [count,] 3, height, width), in its own memory.

    Raises:
        ValueError: sizes or types differ.
    """
    first = images[0]
    if kinds := {f"{each.shape} {each.dtype}" for each in images[1:]} - {f"{first.shape} {first.dtype}"}:
        raise ValueError(
            f"A batch needs pictures of one size and type, got {first.shape} {first.dtype} and {min(kinds)}: "
            "give every tile the same transforms, with a size_px."
        )
    *count, height, width, channels = first.shape
    planes = np.empty((len(images), *count, channels, height, width), first.dtype)
    pictures = (each for image in images for each in image.reshape(-1, height, width, channels))
    for picture, out in zip(pictures, planes.reshape(-1, channels, height, width), strict=True):
        cv2.split(picture, [*out])
    return planes
