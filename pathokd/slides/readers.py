"""Pixels out of a file, behind one small interface: OpenSlide first, tifffile and Pillow for what it
refuses."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import openslide
import tifffile
from PIL import ImageCms

from pathokd.errors import SlideError
from pathokd.slides.colour import on_white
from pathokd.slides.picture import SUFFIXES, PictureReader
from pathokd.slides.tiff import TiffReader
from pathokd.slides.tiled import CACHE_BYTES, TiledPage
from pathokd.types import Rgb

DIRECT_VENDORS = ("aperio", "generic-tiff")
"""Formats whose levels are plain tiled TIFF pages."""


class Reader(Protocol):
    """One open file, closed when its last reference goes, so that no read in flight loses it.

    `read_region` may be called from many threads at once.
    """

    vendor: str
    dimensions: tuple[int, int]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    properties: Mapping[str, str]
    associated_images: tuple[str, ...]
    icc_profile: bytes | None

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb:
        """Pixels at `location` (level-0 top-left, any integers), white where the slide has none."""
        ...


class OpenSlideReader:
    """A slide opened by OpenSlide.

    Tiles of JPEG-compressed TIFFs are decoded and pasted directly where that gives OpenSlide's own pixels: compositing
    them takes OpenSlide more time than decoding. The first box read is compared with OpenSlide's, and whatever is odd
    about a file or a box is left to OpenSlide.

    OpenSlide latches errors: after one failed read every later call on the handle fails. `Slide` therefore
    throws a failed reader away.
    """

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        self._slide.set_cache(_shared_cache())
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        self.vendor = self.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.dimensions = self._slide.dimensions
        self.level_dimensions = self._slide.level_dimensions
        self.level_downsamples = self._slide.level_downsamples
        self.associated_images = tuple(self._slide.associated_images)
        self.icc_profile = _profile(self._slide)
        self._file = _open_tiff(path) if self.vendor in DIRECT_VENDORS else None
        self._direct = jpeg_pages(self._file, self.level_dimensions) if self._file else {}
        if self.vendor == "aperio":  # OpenSlide draws what a coarser level leaves out from the finer one
            self._direct = {level: page for level, page in self._direct.items() if not level or page.is_whole}
        self._trusted: set[int] = set()

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb:
        """Pixels at `location`; OpenSlide itself places them at sub-pixel precision on coarser levels."""
        page, down = self._direct.get(level), self.level_downsamples[level]
        if page is None or location[0] % down or location[1] % down:
            return self._composited(location, level, size)
        try:
            pixels = page.read(round(location[0] / down), round(location[1] / down), size)
        except (ValueError, RuntimeError, OSError, tifffile.TiffFileError):
            return self._composited(location, level, size)  # which says what is wrong, or knows better
        if level not in self._trusted:
            expected = self._composited(location, level, size)
            if not np.array_equal(pixels, expected):
                self._direct.pop(level, None)
                return expected
            self._trusted.add(level)
        return pixels

    def __del__(self) -> None:
        file: tifffile.TiffFile | None = getattr(self, "_file", None)
        if file is not None:
            file.close()

    def _composited(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb:
        try:
            rgba = np.asarray(self._slide.read_region(location, level, size))
        except openslide.OpenSlideError as error:
            raise SlideError(str(error)) from error
        return on_white(rgba)


def _open_tiff(path: Path) -> tifffile.TiffFile | None:
    """The file as tifffile sees it; None if it cannot parse it."""
    try:
        return tifffile.TiffFile(path)
    except (tifffile.TiffFileError, ValueError, OSError):
        return None


def jpeg_pages(file: tifffile.TiffFile, level_dimensions: Sequence[tuple[int, int]]) -> dict[int, TiledPage]:
    """The tiled 8-bit JPEG page of each level that has one."""
    try:
        pages = [page.aspage() for page in file.pages]
    except Exception:  # noqa: BLE001 (a damaged directory raises anything; OpenSlide has read this file)
        return {}
    fit = {(page.imagewidth, page.imagelength): page for page in reversed(pages) if _is_jpeg_tiles(page)}
    return {level: TiledPage(fit[size]) for level, size in enumerate(level_dimensions) if size in fit}


def _is_jpeg_tiles(page: tifffile.TiffPage) -> bool:
    return bool(
        page.is_tiled
        and page.compression == tifffile.COMPRESSION.JPEG
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and (page.samplesperpixel, page.bitspersample) == (3, 8)
    )


def open_reader(path: Path) -> Reader:
    """Open `path` with the reader that understands it.

    Raises:
        SlideError: the file is missing, damaged, or of a format no reader knows.
    """
    try:
        exists = path.exists()
    except OSError as error:  # a name too long for the disk, a folder that may not be entered
        raise SlideError(f"{path} cannot be reached ({error.strerror}): check the path and its rights.") from error
    if not exists:
        raise SlideError(f"{path} does not exist: check the path (paths in a CSV are relative to the CSV).")
    try:
        reader = OpenSlideReader(path)
        # OpenSlide takes some OME-TIFFs for plain ones, and then knows neither their mpp nor their levels.
        is_ome = "<OME " in reader.properties.get("tiff.ImageDescription", "")
        return TiffReader(path) if is_ome and reader.vendor == "generic-tiff" else reader
    except openslide.OpenSlideUnsupportedFormatError:
        return PictureReader(path) if path.suffix.lower() in SUFFIXES else TiffReader(path)
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(
            f"OpenSlide refuses {path} ({_reason(error, path)}): "
            "the file is damaged or of a variant it cannot read; "
            "copy it again from its source or convert it to a tiled pyramidal TIFF."
        ) from error


def _profile(slide: openslide.OpenSlide) -> bytes | None:
    """The slide's ICC profile; one that is damaged still counts as there, and is reported when it is used."""
    try:
        profile = slide.color_profile
    except ImageCms.PyCMSError:
        return b"damaged"
    return None if profile is None else bytes(profile.tobytes())


def _reason(error: Exception, path: Path) -> str:
    """OpenSlide's message without the path, which the sentence already names."""
    return str(error).replace(f"Reading {path}:", "").strip().rstrip(".")


_cache: tuple[int, openslide.OpenSlideCache] | None = None
_cache_lock = threading.Lock()


def _shared_cache() -> openslide.OpenSlideCache:
    """The process's tile cache; a forked child makes its own, because the parent may have held its mutex."""
    global _cache
    with _cache_lock:
        if _cache is None or _cache[0] != os.getpid():
            _ABANDONED.append(_cache)
            _cache = (os.getpid(), openslide.OpenSlideCache(CACHE_BYTES))
        return _cache[1]


_ABANDONED: list[object] = []
"""Library objects inherited over a fork: kept alive, since freeing them could wait for a lock nobody will
release."""


def abandon(thing: object) -> None:
    """Never finalise `thing` in this process."""
    _ABANDONED.append(thing)


def _after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
