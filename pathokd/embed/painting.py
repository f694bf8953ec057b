"""Tiles of a slide as coloured squares on its faded overview."""

import math
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pathokd.slides.overview import Overview
from pathokd.types import IntArray, Mask, Rgb


def paint_tiles(
    picture: Overview,
    coords: IntArray,
    coords_attrs: Mapping[str, Any],
    colours: npt.NDArray[np.uint8],
    shown: Mask,
) -> Rgb:
    """Fill each tile's square with its colour; overlapping tiles get the square around their centre.

    Args:
        picture: What to draw on.
        coords: (n, 2) level-0 x, y of top left corners.
        coords_attrs: Attributes of `coords` as in the HDF5 file.
        colours: (n, 3).
        shown: (n,) which tiles to draw.

    Returns:
        An image of the picture's size.
    """
    canvas = np.asarray(255 - (255 - picture.rgb) // 3, np.uint8)
    # `patch_size_level0` is rounded, which would leave seams between squares.
    side = coords_attrs["patch_size"] * coords_attrs["mpp_target"] / coords_attrs["mpp_level0"] / picture.downsample
    overlap = max(coords_attrs["overlap"], 0)  # negative where a stride leaves gaps, which nobody looked at
    width = side * (1 - overlap / coords_attrs["patch_size"])
    corners = np.asarray(coords) / picture.downsample + (side - width) / 2
    for (x, y), colour in zip(corners[shown], colours[shown], strict=True):
        first, last = (round(x), round(y)), (math.ceil(x + width) - 1, math.ceil(y + width) - 1)
        cv2.rectangle(canvas, first, last, tuple(int(c) for c in colour), cv2.FILLED)
    return canvas
