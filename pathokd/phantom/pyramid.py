"""Tiled pyramidal TIFF that OpenSlide reads, with the faults that tests ask for."""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tifffile
from PIL import Image

from pathokd.files import atomic_path
from pathokd.types import Mpp, Rgb

Flavour = Literal["generic-tiff", "aperio"]
"""What OpenSlide takes the file for."""
TilePlace = tuple[int, int, int]
"""A stored tile: level, row, column."""


def write_pyramid(
    path: str | Path,
    rgb: Rgb,
    mpp: Mpp | None,
    *,
    downsamples: Sequence[float] = (4.0, 16.0),
    tile_px: int = 256,
    quality: int = 80,
    flavour: Flavour = "generic-tiff",
    objective: float | None = None,
    corrupt: Sequence[TilePlace] = (),
    icc_profile: bytes | None = None,
) -> Path:
    """Write an image as a slide.

    The default is a plain tiled TIFF with its resolution in the TIFF tags: no vendor made it and none is
    claimed. `aperio` writes an Aperio-style description, so that readers' Aperio path (mpp and objective
    power as properties) can be tested.

    Args:
        path: file to write; complete or not there at all.
        rgb: level 0.
        mpp: microns per pixel of level 0; None leaves the slide without resolution.
        downsamples: of the further levels, any float over 1; sizes are rounded, so the true downsamples are
            rarely whole, and levels smaller than 32 pixels are left out.
        tile_px: side of the stored tiles, a multiple of 16.
        quality: JPEG quality, chroma halved in both directions.
        flavour: see `Flavour`.
        objective: magnification in the Aperio description.
        corrupt: tiles whose JPEG header is wiped, so that reading them fails.
        icc_profile: bytes of a colour profile to embed.

    Returns:
        `path`.

    Raises:
        ValueError: an image, tile size or corrupt tile that cannot be.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be (rows, columns, 3) uint8, got {rgb.shape} {rgb.dtype}: convert the image first.")
    check_tile(tile_px)
    if any(downsample <= 1 for downsample in downsamples):
        raise ValueError(f"downsamples of further levels must exceed 1, got {tuple(downsamples)}.")
    levels = [rgb, *_reduce(rgb, downsamples)]
    for level, row, column in corrupt:
        rows, columns = (-(-n // tile_px) for n in levels[level].shape[:2]) if level < len(levels) else (0, 0)
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"corrupt tile {(level, row, column)} is missing: level {level} is {rows} x {columns} tiles."
            )
    with atomic_path(path) as part:
        with tifffile.TiffWriter(part) as tif:
            for level, image in enumerate(levels):
                bad = {(row, column) for at, row, column in corrupt if at == level}
                _write_level(
                    tif,
                    _encoded_tiles([image], tile_px, quality, bad),
                    image.shape[:2],
                    _pixels_per_cm(mpp, rgb.shape[1] / image.shape[1], flavour),
                    tile_px=tile_px,
                    is_first=level == 0,
                    description=_describe(image, rgb, mpp, tile_px, quality, flavour, objective),
                    icc_profile=icc_profile if level == 0 else None,
                )
        _name_jpeg(part)
    return Path(path)


def check_tile(tile_px: int) -> None:
    """Raise ValueError for tiles that TIFF cannot hold."""
    if tile_px < 16 or tile_px % 16:
        raise ValueError(f"tile_px must be a multiple of 16, got {tile_px}: try {max(16, round(tile_px / 16) * 16)}.")


def write_strips(
    path: str | Path,
    strips: Iterable[Rgb],
    size: tuple[int, int],
    mpp: Mpp,
    *,
    strip_px: int,
    tile_px: int = 256,
    quality: int = 90,
) -> Path:
    """Write a slide larger than memory from strips of level 0, with further levels at 4 and 16 level-0 pixels.

    A sixteenth of the slide is held at a time.

    Args:
        path: file to write; complete or not there at all.
        strips: full-width strips from top to bottom, (strip_px, width, 3); the last may be lower.
        size: width and height of level 0.
        mpp: microns per pixel of level 0.
        strip_px: rows of a strip, a multiple of `tile_px` and of 16.
        tile_px: side of the stored tiles.
        quality: JPEG quality.
    """
    if strip_px % tile_px or tile_px % 16:
        raise ValueError(f"strip_px must be a multiple of tile_px, and that of 16, got {strip_px} and {tile_px}.")
    width, height = size
    smaller = np.full((max(1, height // 4), max(1, width // 4), 3), 255, np.uint8)

    def passing() -> Iterator[Rgb]:
        row = 0
        for strip in strips:
            rows = min(len(strip) // 4, len(smaller) - row)
            if rows > 0:
                part = strip[: 4 * rows, : 4 * smaller.shape[1]]
                smaller[row : row + rows] = cv2.resize(part, (smaller.shape[1], rows), interpolation=cv2.INTER_AREA)
            row += rows
            yield strip

    with atomic_path(path) as part_path:
        with tifffile.TiffWriter(part_path, bigtiff=3 * width * height > 2**31) as tif:
            write = functools.partial(_write_level, tif, tile_px=tile_px, description="pathokd simulation")
            tiles = _encoded_tiles(passing(), tile_px, quality, set())
            write(tiles, (height, width), 1e4 / mpp, is_first=True)
            for downsample in (4, 16):
                image = smaller if downsample == 4 else next(_reduce(smaller, [4.0]), None)
                if image is not None and min(image.shape[:2]) >= 32:
                    tiles = _encoded_tiles([image], tile_px, quality, set())
                    write(tiles, image.shape[:2], 1e4 / (mpp * downsample), is_first=False)
        _name_jpeg(part_path)
    return Path(path)


def _write_level(
    tif: tifffile.TiffWriter,
    tiles: Iterator[bytes],
    shape: tuple[int, ...],
    per_cm: float,
    *,
    tile_px: int,
    is_first: bool,
    description: str,
    icc_profile: bytes | None = None,
) -> None:
    tif.write(
        tiles,
        shape=(*shape, 3),
        dtype=np.uint8,
        photometric="ycbcr",
        tile=(tile_px, tile_px),
        compression="zlib",  # named JPEG below
        subfiletype=0 if is_first else 1,
        description=description,
        software=False,
        metadata=None,
        resolution=(per_cm, per_cm),
        resolutionunit="NONE" if per_cm == 1.0 else "CENTIMETER",
        iccprofile=icc_profile,
    )


def _name_jpeg(path: Path) -> None:
    """Set the tags to what the tiles really are; tifffile writes these values only beside imagecodecs."""
    with tifffile.TiffFile(path, mode="r+") as tif:
        for page in tif.pages:
            page.aspage().tags["Compression"].overwrite(tifffile.COMPRESSION.JPEG)
            page.aspage().tags["YCbCrSubSampling"].overwrite((2, 2))


def _reduce(rgb: Rgb, downsamples: Sequence[float]) -> Iterator[Rgb]:
    """Area averages of level 0."""
    for downsample in downsamples:
        height, width = (round(n / downsample) for n in rgb.shape[:2])
        if min(height, width) >= 32:
            yield np.asarray(cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _encoded_tiles(strips: Iterable[Rgb], tile_px: int, quality: int, bad: set[tuple[int, int]]) -> Iterator[bytes]:
    """JPEG streams row by row; the rim is filled by repeating edge pixels, which costs the fewest bytes."""
    rows = itertools.count()
    for strip in strips:
        height, width = strip.shape[:2]
        padded = np.pad(strip, ((0, -height % tile_px), (0, -width % tile_px), (0, 0)), mode="edge")
        for top in range(0, padded.shape[0], tile_px):
            row = next(rows)
            for column in range(padded.shape[1] // tile_px):
                tile = padded[top : top + tile_px, column * tile_px : (column + 1) * tile_px]
                buffer = io.BytesIO()
                Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
                data = buffer.getvalue()
                yield bytes(min(64, len(data))) + data[64:] if (row, column) in bad else data


def _describe(
    image: Rgb,
    rgb: Rgb,
    mpp: Mpp | None,
    tile_px: int,
    quality: int,
    flavour: Flavour,
    objective: float | None,
) -> str:
    if flavour == "generic-tiff":
        return "pathokd phantom"
    size = f"{rgb.shape[1]}x{rgb.shape[0]} [0,0 {rgb.shape[1]}x{rgb.shape[0]}] ({tile_px}x{tile_px})"
    if image is not rgb:
        size += f" -> {image.shape[1]}x{image.shape[0]}"
    facts = [f"Aperio Image Library (style of; pathokd phantom)\r\n{size} JPEG/YCC Q={quality}"]
    if objective is not None:
        facts.append(f"AppMag = {objective:g}")
    if mpp is not None:
        facts.append(f"MPP = {mpp:.6g}")
    return "|".join(facts)


def _pixels_per_cm(mpp: Mpp | None, downsample: float, flavour: Flavour) -> float:
    """Value of the TIFF resolution tags; 1 means none, as without mpp and in Aperio files."""
    return 1.0 if mpp is None or flavour == "aperio" else 1e4 / (mpp * downsample)
