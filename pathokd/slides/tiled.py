"""Boxes of pixels out of a tiled TIFF page: each tile is decoded once and kept in a cache that all slides share."""

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
from tifffile import TiffFileError
from tifffile.tifffile import EXTRASAMPLE

from pathokd.slides.colour import on_white
from pathokd.types import Rgb

CACHE_BYTES = 128 * 2**20
"""Decoded tiles that all slides of a process keep together: two rows of tiles of a slide 64,000 px wide. A larger cache
is slower where it is not needed, as it always works on memory that no processor cache holds."""

_numbers = itertools.count()


class TiledPage:
    """One page of a TIFF with 8-bit RGB tiles.

    Args:
        page: a tiled page of a `tifffile.TiffFile`, which must stay open.
    """

    def __init__(self, page: Any) -> None:
        self._page, self._number = page, next(_numbers)
        self._tile_size: tuple[int, int] = page.tilewidth, page.tilelength
        self._across = -(-page.imagewidth // page.tilewidth)
        self.size: tuple[int, int] = page.imagewidth, page.imagelength
        page.parent.filehandle.lock = (
            True  # tifffile's lock is none by default, and threads would seek under each other
        )

    @property
    def is_whole(self) -> bool:
        """Whether the file leaves out none of its tiles."""
        return all(self._page.databytecounts)

    def read(self, x: int, y: int, size: tuple[int, int]) -> Rgb:
        """Pixels of a box, white outside the page and where the file leaves out a tile.

        Args:
            x: left edge; may lie outside.
            y: top edge.
            size: width and height.

        Returns:
            shape (height, width, 3).

        Raises:
            ValueError, RuntimeError, OSError, TiffFileError: a tile is damaged, as tifffile and imagecodecs say it.
        """
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        tile_width, tile_height = self._tile_size
        right, bottom = min(x + size[0], self.size[0]), min(y + size[1], self.size[1])
        for row in range(max(y, 0) // tile_height, -(-bottom // tile_height)):
            for column in range(max(x, 0) // tile_width, -(-right // tile_width)):
                tile = _cache.get((self._number, row * self._across + column), self._decode)
                if tile is not None:
                    _paste(out, tile, column * tile_width - x, row * tile_height - y)
        return out

    def _decode(self, key: tuple[int, int]) -> Rgb | None:
        """One tile, or None where the file leaves it out (which TIFF calls sparse: background)."""
        index = key[1]
        count = self._page.databytecounts[index]
        if not count:
            return None
        handle = self._page.parent.filehandle
        with handle.lock:
            handle.seek(self._page.dataoffsets[index])
            data = handle.read(count)
        if len(data) < count:  # decoders make up what is missing of a JPEG
            raise TiffFileError(f"the file ends within tile {index}")
        segment, _, _ = self._page.decode(data, index, jpegtables=self._page.jpegtables)
        if segment is None:
            return None
        row, column = divmod(index, self._across)
        # Tiles of the last row and column hold padding beyond the page.
        height, width = self.size[1] - row * self._tile_size[1], self.size[0] - column * self._tile_size[0]
        return opaque(segment[0, :height, :width], self._page)


def opaque(pixels: npt.NDArray[np.uint8], page: Any) -> Rgb:
    """Pixels of a page without their alpha channel: transparent ones are white.

    Args:
        pixels: shape (height, width, 3 or 4).
        page: the `tifffile.TiffPage` they are of.
    """
    alpha = next(iter(page.extrasamples), None) if pixels.shape[-1] == 4 else None
    if alpha == EXTRASAMPLE.UNASSALPHA:
        return on_white(np.ascontiguousarray(pixels))
    if alpha == EXTRASAMPLE.ASSOCALPHA:
        wide = pixels.astype(np.int16)  # what is stored is multiplied by alpha already
        white: Rgb = np.clip(wide[..., :3] + 255 - wide[..., 3:], 0, 255).astype(np.uint8)
        return white
    return np.ascontiguousarray(pixels[..., :3])


def _paste(out: Rgb, tile: Rgb, left: int, top: int) -> None:
    """Lay `tile` with its corner at (left, top) of `out`, as far as it lies on it."""
    x0, y0 = max(left, 0), max(top, 0)
    part = tile[y0 - top : out.shape[0] - top, x0 - left : out.shape[1] - left]
    out[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part


class _TileCache:
    """Least recently used tiles, by their bytes. A tile that two threads want at once is decoded by one of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._held, self._lock = capacity, 0, threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], Future[Rgb | None]] = OrderedDict()

    def get(self, key: tuple[int, int], decode: Callable[[tuple[int, int]], Rgb | None]) -> Rgb | None:
        with self._lock:
            found = self._tiles.get(key)
            if found is None:
                mine = self._tiles[key] = Future()
            else:
                self._tiles.move_to_end(key)
        if found is not None:
            return found.result()
        try:
            tile = decode(key)
        except BaseException as error:
            with self._lock:
                del self._tiles[key]
            mine.set_exception(error)
            raise
        mine.set_result(tile)
        with self._lock:
            self._held += _nbytes(tile)
            self._shrink()
        return tile

    def _shrink(self) -> None:
        """Drop the oldest tiles until the rest fits; one that is still being decoded ends the search."""
        while self._held > self._capacity:
            key, oldest = next(iter(self._tiles.items()))
            if not oldest.done():
                return
            self._held -= _nbytes(oldest.result())
            del self._tiles[key]


def _nbytes(tile: Rgb | None) -> int:
    return 0 if tile is None else tile.nbytes


_cache = _TileCache(CACHE_BYTES)


def _after_fork() -> None:
    global _cache
    _cache = _TileCache(CACHE_BYTES)


os.register_at_fork(after_in_child=_after_fork)
