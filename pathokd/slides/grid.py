"""Where tiles go on a slide."""

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pathokd.types import Mpp

Border = Literal["inside", "cover"]


class TileGrid(NamedTuple):
    """Level-0 top-left corners of tiles, row by row."""

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    side: float
    """Side of a tile in level-0 pixels."""


def tile_grid(
    dimensions: tuple[int, int],
    mpp_level0: Mpp,
    *,
    mpp: Mpp,
    tile_px: int,
    stride_px: int | None = None,
    border: Border = "inside",
) -> TileGrid:
    """Regular grid of tiles at `mpp`, anchored at the slide's top-left corner.

    Side and stride are floats in level-0 pixels, and each corner is rounded on its own, so rounding never
    accumulates. Border rule: "inside" keeps tiles that lie wholly on the slide (to half a pixel of the tile),
    so a strip narrower than a stride stays free on the right and below; "cover" adds the tiles that overhang,
    so that every pixel is in one.

    Args:
        dimensions: width and height of level 0 in pixels.
        mpp_level0: the slide's microns per level-0 pixel.
        mpp: microns per tile pixel.
        tile_px: side of a tile in its own pixels.
        stride_px: step between tiles in tile pixels; None is `tile_px` (no overlap, no gap).
        border: see above.

    Returns:
        corners as int64 arrays of equal length, and the side of a tile in level-0 pixels.
    """
    step_px = tile_px if stride_px is None else stride_px
    if min(mpp_level0, mpp, tile_px, step_px) <= 0:
        raise ValueError(
            f"mpp, tile_px and stride_px must be positive, got {mpp_level0=}, {mpp=}, {tile_px=}, {stride_px=}"
        )
    if border not in ("inside", "cover"):
        raise ValueError(f"border must be 'inside' or 'cover', got {border!r}")
    downsample = mpp / mpp_level0
    side, step = tile_px * downsample, step_px * downsample
    counts = [_count(length, side, step, downsample, border) for length in dimensions]
    xs, ys = (np.rint(np.arange(count) * step).astype(np.int64) for count in counts)
    # With gaps between tiles the last corner may be rounded off the slide.
    xs, ys = xs[xs < dimensions[0]], ys[ys < dimensions[1]]
    grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
    return TileGrid(grid_x.ravel(), grid_y.ravel(), side)


def _count(length: int, side: float, step: float, downsample: float, border: Border) -> int:
    """Tiles along one axis."""
    if border == "cover":
        return max(1, math.ceil((length - side) / step - 1e-9) + 1) if step <= side else math.ceil(length / step)
    room = length - side + downsample / 2
    return 0 if room < 0 else math.floor(room / step) + 1
