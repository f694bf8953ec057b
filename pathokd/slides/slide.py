"""`Slide`: tiles of any size at any microns per pixel, from many threads, across pickling, forks and damaged
places."""

import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pathokd.errors import SlideError
from pathokd.slides.colour import to_srgb
from pathokd.slides.overview import Overview, read_overview
from pathokd.slides.pyramid import choose_level, is_upsampling, read_window
from pathokd.slides.readers import Reader, abandon, open_reader
from pathokd.slides.resolution import MppSource, Resolution, resolve_mpp
from pathokd.types import Mpp, Rgb


class Slide:
    """A whole slide.

    One object serves many threads without a lock around reading. The file is opened on first use in each
    process, so a `Slide` may be pickled, and used on both sides of a fork. A damaged place raises SlideError
    and leaves the slide usable: OpenSlide latches errors on a handle, so a failed handle is replaced, and
    threads whose reads died with it are served again.

    Args:
        path: the file (for MRXS and DICOM: the index file, any instance).
        mpp: microns per level-0 pixel, whatever the file says.
        mpp_else: microns per level-0 pixel if the file does not say.
        icc: convert tiles and thumbnails from the slide's ICC profile to sRGB, after the resize.

    Raises:
        SlideError: the file is missing, damaged or of an unknown format. A slide without a usable mpp can be
            opened; asking for `mpp` or a tile then says what is missing.
    """

    def __init__(
        self, path: str | Path, *, mpp: Mpp | None = None, icc: bool = False, mpp_else: Mpp | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self.given_mpp, self.mpp_else = mpp, mpp_else
        self.icc = icc
        self._open: tuple[int, Reader] | None = None
        reader = self._reader()
        self.vendor = reader.vendor
        self.dimensions = reader.dimensions
        self.level_dimensions = reader.level_dimensions
        self.level_downsamples = reader.level_downsamples
        self.level_count = len(self.level_downsamples)
        self.properties = dict(reader.properties)
        self.associated_images = reader.associated_images
        self.icc_profile = reader.icc_profile

    @cached_property
    def resolution(self) -> Resolution:
        """Pixel size of level 0 with its source and warnings; SlideError if there is no usable one."""
        return resolve_mpp(self.properties, self.given_mpp, self.path, self.mpp_else)

    @property
    def mpp(self) -> Mpp:
        """Microns per level-0 pixel, mean of both axes."""
        return (self.resolution.mpp_x + self.resolution.mpp_y) / 2

    @property
    def mpp_x(self) -> Mpp:
        """Microns per level-0 pixel along a row."""
        return self.resolution.mpp_x

    @property
    def mpp_y(self) -> Mpp:
        """Microns per level-0 pixel along a column."""
        return self.resolution.mpp_y

    @property
    def mpp_source(self) -> MppSource:
        """Who states the mpp: "given", "openslide", "ome", "tiff" or "objective"."""
        return self.resolution.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the slide, one sentence each; empty for most."""
        found: list[str] = []
        try:
            found.extend(self.resolution.warnings)
        except SlideError as error:
            found.append(str(error))
        if self.icc and self.icc_profile is None:
            found.append("ICC conversion was asked for, but the slide has no ICC profile: colours stay as they are.")
        return tuple(found)

    def read_tile(self, x: int, y: int, *, mpp: Mpp, tile_px: int, allow_upsampling: bool = False) -> Rgb:
        """Read a square tile by its level-0 top-left corner.

        Pixels outside the slide and transparent ones are white. A level within 2 % of `mpp` is used as it is;
        else the next finer level is shrunk by area averaging over exactly the asked field of view.

        Args:
            x: left edge in level-0 pixels; may lie outside the slide.
            y: top edge in level-0 pixels.
            mpp: microns per output pixel.
            tile_px: side of the output in pixels.
            allow_upsampling: permit an `mpp` finer than the slide has, by interpolation.

        Returns:
            shape (tile_px, tile_px, 3).

        Raises:
            SlideError: no usable mpp, an `mpp` finer than the slide's, or a damaged place in the file.
        """
        if not mpp > 0 or tile_px < 1:
            raise ValueError(f"mpp and tile_px must be positive, got mpp={mpp!r}, tile_px={tile_px!r}")
        downsample = mpp / self.mpp
        self.check_mpp(mpp, allow_upsampling)
        return self.read_area(x, y, downsample, (tile_px, tile_px))

    def check_mpp(self, mpp: Mpp, allow_upsampling: bool = False) -> None:
        """Raise SlideError if tiles at `mpp` would have to be enlarged and that is not allowed."""
        if not allow_upsampling and is_upsampling(choose_level(self.level_downsamples, mpp / self.mpp).scale):
            raise SlideError(
                f"{self.path} has {self.mpp:.4g} um/px at best, {mpp:g} was asked for: "
                "ask for a coarser mpp, or allow upsampling (--allow-upsampling)."
            )

    def read_area(self, x: int, y: int, downsample: float, out_size: tuple[int, int]) -> Rgb:
        """Read a rectangle at `downsample` level-0 pixels per output pixel; needs no mpp.

        Args:
            x: left edge in level-0 pixels.
            y: top edge in level-0 pixels.
            downsample: level-0 pixels per output pixel.
            out_size: width and height of the output in pixels.

        Returns:
            shape (height, width, 3).
        """
        level, scale = choose_level(self.level_downsamples, downsample)
        size, resize = read_window(scale, out_size)
        x, y = int(x), int(y)
        if not resize:
            # Snapped to the level's grid: sub-pixel placement would blur pixels that need no resampling.
            step = self.level_downsamples[level]
            x, y = round(round(x / step) * step), round(round(y / step) * step)
        rgb = self._read(x, y, level, size)
        if resize:
            rgb = _resample(rgb, scale, out_size)
        return to_srgb(rgb, self.icc_profile) if self.icc and self.icc_profile else rgb

    def thumbnail(self, max_px: int) -> Rgb:
        """The whole slide with its longer side at most `max_px` pixels (never enlarged).

        Raises:
            SlideError: a place on the slide is damaged; `overview` goes on without it.
        """
        overview = self.overview(max_px=max_px)
        if overview.unreadable.any():
            raise SlideError(
                f"{overview.unreadable.mean():.1%} of {self.path} cannot be read at {max_px} pixels: "
                "the file is damaged; copy it again from its source."
            )
        return overview.rgb

    def overview(self, *, mpp: Mpp | None = None, max_px: int = 2048) -> Overview:
        """A thumbnail that knows its scale and its unreadable places.

        Args:
            mpp: microns per pixel wanted; ignored if the slide has none, coarsened to respect `max_px`.
            max_px: longest side allowed.
        """
        downsample = max(1.0, max(self.dimensions) / max_px)
        if mpp is not None:
            downsample = max(downsample, mpp / self.mpp)
        return read_overview(self, downsample)

    def close(self) -> None:
        """Release the file once reads in flight have ended; the next read opens it again."""
        with _open_lock:
            if self._open is not None:
                self._forget(self._open)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r}, {self.dimensions[0]} x {self.dimensions[1]}, {self.vendor})"

    def _read(self, x: int, y: int, level: int, size: tuple[int, int]) -> Rgb:
        opened = self._opened()
        try:
            return opened[1].read_region((x, y), level, size)
        except SlideError:
            # This place may be damaged, or another thread's damaged place killed the handle meanwhile.
            with _open_lock:
                self._forget(opened)
        alone = open_reader(self.path)
        try:
            return alone.read_region((x, y), level, size)
        except SlideError as error:
            raise SlideError(
                f"{self.path} cannot be read at x={x}, y={y}, level {level}, {size[0]} x {size[1]} px "
                f"({str(error).rstrip('.')}): the file is damaged there; copy it again from its source."
            ) from error

    def _reader(self) -> Reader:
        return self._opened()[1]

    def _opened(self) -> tuple[int, Reader]:
        """This process's open file with its process id, opened if need be."""
        opened = self._open
        if opened is not None and opened[0] == os.getpid():
            return opened
        with _open_lock:
            if self._open is None or self._open[0] != os.getpid():
                if self._open is not None:
                    abandon(self._open)
                self._open = (os.getpid(), open_reader(self.path))
            return self._open

    def _forget(self, opened: tuple[int, Reader]) -> None:
        """Drop an open file, if it is still the current one. Threads in the midst of a read keep it alive."""
        if self._open is opened:
            self._open = None
        if opened[0] != os.getpid():
            abandon(opened)


def _resample(rgb: Rgb, scale: float, out_size: tuple[int, int]) -> Rgb:
    """Resize by exactly `1 / scale` from the top-left corner and crop; area average down, linear up."""
    # Given factors instead of a size, cv2 uses them as they are: a rounded window then does not stretch the
    # view.
    factor = 1 / scale
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    resized = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=method)
    return np.ascontiguousarray(resized[: out_size[1], : out_size[0]], dtype=np.uint8)


_open_lock = threading.Lock()


def _after_fork() -> None:
    global _open_lock
    _open_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
