"""A few tiles that stand for all of a slide or folder."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from pathokd.augment.stain_math import to_od
from pathokd.data.batch import TileSource
from pathokd.errors import SlideError
from pathokd.slides.grid import tile_grid
from pathokd.slides.slide import Slide
from pathokd.slides.sources import SlideSource
from pathokd.slides.tile import find_tissue
from pathokd.slides.tissue import tissue_fraction
from pathokd.types import IntArray, Rgb


def spread(rows: Sequence[int] | IntArray, count: int) -> list[int]:
    """Up to `count` of `rows`, evenly spread."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [int(rows[number]) for number in picked]


def readable(source: TileSource, rows: Sequence[int]) -> Iterator[Rgb]:
    """Some tiles, but those on a damaged place of their slide: the others tell as much."""
    for row in rows:
        with contextlib.suppress(SlideError):
            yield source.read(row)


def tissue_tiles(slide: Slide, count: int, tile_px: int = 256) -> list[Rgb]:
    """The tiles of a slide with most tissue, at 1 um/px or, if it is coarser, at its own resolution."""
    mpp = max(1.0, slide.mpp)
    grid = tile_grid(slide.dimensions, slide.mpp, mpp=mpp, tile_px=tile_px, border="cover")
    overview = slide.overview(mpp=8.0)
    share = tissue_fraction(
        find_tissue(overview, slide.mpp), grid.x, grid.y, mask_downsample=overview.downsample, tile_level0=grid.side
    )
    tiles = []
    for number in np.argsort(-share, kind="stable")[:count]:
        with contextlib.suppress(SlideError):  # a damaged place; the rest of the slide tells as much
            tiles.append(slide.read_tile(int(grid.x[number]), int(grid.y[number]), mpp=mpp, tile_px=tile_px))
    if not tiles:
        raise SlideError(f"{slide.path}: none of its tissue can be read; copy it again from its source.")
    return tiles


def typical_tile(tiles: TileSource | Sequence[SlideSource]) -> Rgb:
    """A tile to show presets on: of some forty, the one whose colours vary most.

    Raises:
        SlideError: no slide or tile can be read; of slides the first one's trouble.
    """
    shown = _shown(tiles) if isinstance(tiles, Sequence) else list(readable(tiles, spread(range(len(tiles)), 40)))
    if not shown:
        raise SlideError("Not one of forty tiles can be read: look at their slides with `pathokd inspect`.")
    return max(shown, key=lambda tile: float(to_od(tile).std(axis=(0, 1)).sum()))


def _shown(slides: Sequence[SlideSource]) -> list[Rgb]:
    """Tiles of the first slide that can be read."""
    trouble: SlideError | None = None
    for source in slides:
        try:
            with source.open() as slide:
                return tissue_tiles(slide, 40)
        except SlideError as error:
            trouble = trouble or error
    raise trouble or SlideError("There is no slide to show presets on.")
