"""The whole slide as one small image, read in blocks so that a damaged place costs no more than itself."""

from typing import NamedTuple, Protocol

import numpy as np

from pathokd.errors import SlideError
from pathokd.slides.pyramid import choose_level
from pathokd.types import Mask, Rgb

BLOCK_LEVEL_PX = 4096
"""Side of a block in level pixels, which bounds memory on slides that have no small level."""
MIN_BLOCK_PX = 32
"""A block that fails is split until its side in output pixels is at most this."""


class Overview(NamedTuple):
    """A thumbnail with its scale."""

    rgb: Rgb
    """shape (height, width, 3); white where unreadable."""
    unreadable: Mask
    """shape (height, width); True where the file is damaged."""
    downsample: float
    """Level-0 pixels per thumbnail pixel, on both axes. The last row and column may reach beyond the
    slide."""


class AreaReader(Protocol):
    """What an overview needs of a slide."""

    dimensions: tuple[int, int]
    level_downsamples: tuple[float, ...]

    def read_area(self, x: int, y: int, downsample: float, out_size: tuple[int, int]) -> Rgb:
        """A rectangle by its level-0 corner at `downsample` level-0 pixels per output pixel."""
        ...


def read_overview(slide: AreaReader, downsample: float) -> Overview:
    """Read the whole slide at `downsample` level-0 pixels per pixel.

    Raises:
        SlideError: nothing of it can be read (the first failure's sentence).
    """
    width, height = (int(np.ceil(side / downsample)) for side in slide.dimensions)
    rgb = np.full((height, width, 3), 255, np.uint8)
    unreadable = np.zeros((height, width), np.bool_)
    scale = choose_level(slide.level_downsamples, downsample).scale
    block = int(max(MIN_BLOCK_PX, BLOCK_LEVEL_PX / scale))
    first_error: SlideError | None = None
    pending = [
        (x, y, min(block, width - x), min(block, height - y))
        for y in range(0, height, block)
        for x in range(0, width, block)
    ]
    while pending:
        x, y, w, h = pending.pop()
        try:
            area = slide.read_area(round(x * downsample), round(y * downsample), downsample, (w, h))
        except SlideError as error:
            first_error = first_error or error
            if max(w, h) > MIN_BLOCK_PX:
                pending.extend(_quarters(x, y, w, h))
            else:
                unreadable[y : y + h, x : x + w] = True
            continue
        rgb[y : y + h, x : x + w] = area
    if first_error is not None and unreadable.all():
        raise first_error
    return Overview(rgb, unreadable, downsample)


def _quarters(x: int, y: int, w: int, h: int) -> list[tuple[int, int, int, int]]:
    left, top = (w + 1) // 2, (h + 1) // 2
    parts = [
        (x, y, left, top),
        (x + left, y, w - left, top),
        (x, y + top, left, h - top),
        (x + left, y + top, w - left, h - top),
    ]
    return [part for part in parts if part[2] and part[3]]
