"""A picture for people: the slide, the outline of its tissue, and the tiles that were kept."""

import io

import cv2
import numpy as np
from PIL import Image

from pathokd.slides.contours import FINE, mask_polygons
from pathokd.slides.overview import Overview
from pathokd.types import IntArray, Mask, Rgb

OUTLINE = (0, 150, 60)
TILE = (20, 60, 200)
UNREADABLE = (220, 0, 0)


def draw_overlay(
    picture: Overview,
    mask: Mask,
    mask_downsample: float,
    x: IntArray,
    y: IntArray,
    tile_level0: float,
) -> Rgb:
    """Draw tissue outlines (green), kept tiles (blue squares) and unreadable places (red) on an overview.

    Args:
        picture: what to draw on; any scale.
        mask: tissue, shape (height, width).
        mask_downsample: level-0 pixels per mask pixel.
        x: left edges of kept tiles in level-0 pixels, shape (n,).
        y: top edges of kept tiles in level-0 pixels, shape (n,).
        tile_level0: side of a tile in level-0 pixels.

    Returns:
        an image of the picture's size.
    """
    canvas = picture.rgb.copy()
    canvas[picture.unreadable] = UNREADABLE
    tiles = canvas.copy()
    lefts, tops = (np.round(np.asarray(c) / picture.downsample).astype(int) for c in (x, y))
    side = round(tile_level0 / picture.downsample)
    for left, top in zip(lefts.tolist(), tops.tolist(), strict=True):
        cv2.rectangle(tiles, (left, top), (left + side - 1, top + side - 1), TILE, 1)
    canvas = np.asarray(cv2.addWeighted(tiles, 0.6, canvas, 0.4, 0), np.uint8)
    zoom = mask_downsample / picture.downsample / FINE
    rings = [np.round((ring + 0.5) * zoom).astype(np.int32) for rings in mask_polygons(mask) for ring in rings]
    cv2.polylines(canvas, rings, isClosed=True, color=OUTLINE, thickness=2, lineType=cv2.LINE_AA)
    return canvas


def jpeg_bytes(rgb: Rgb, quality: int = 88) -> bytes:
    """Encode as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
