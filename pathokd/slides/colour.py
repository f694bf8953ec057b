"""Colours as they are meant: from a scanner's ICC profile to sRGB, and transparent pixels on white."""

import io
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageCms

from pathokd.errors import SlideError
from pathokd.types import Rgb


def to_srgb(rgb: Rgb, icc_profile: bytes) -> Rgb:
    """Convert an image from the colours of `icc_profile` to sRGB (relative colorimetric).

    Args:
        rgb: shape (height, width, 3), in the profile's colours.
        icc_profile: the profile's bytes, as a slide carries them.

    Raises:
        SlideError: the profile cannot be parsed or is not an RGB profile.
    """
    image = ImageCms.applyTransform(Image.fromarray(rgb), _transform(icc_profile))
    if image is None:
        raise SlideError("The ICC transform gave no image; pass icc=False to keep the scanner's colours.")
    return np.asarray(image)


def on_white(rgba: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Rgb:
    """Lay an image with straight (not premultiplied) alpha on white.

    Args:
        rgba: shape (height, width, 4), contiguous.

    Returns:
        shape (height, width, 3), contiguous.
    """
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    # One pass over whole pixels is several times faster than over a strided alpha channel.
    if rgba.view("<u4").min() >= 0xFF000000:
        return np.asarray(rgb, dtype=np.uint8)
    weight = rgba[..., 3:].astype(np.uint16)
    blended = (rgb * weight + 255 * (255 - weight) + 127) // 255
    return blended.astype(np.uint8)


@lru_cache(maxsize=32)
def _transform(icc_profile: bytes) -> ImageCms.ImageCmsTransform:
    """Slides of one scanner share a profile, so the costly set-up is shared too."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except (ImageCms.PyCMSError, OSError) as error:
        raise SlideError(
            f"The slide's ICC profile ({len(icc_profile)} bytes) cannot be used: {error}; pass icc=False."
        ) from error
