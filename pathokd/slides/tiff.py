"""TIFF files that OpenSlide refuses (OME-TIFF, plain TIFF), read with tifffile through the interface of
`readers`."""

import logging
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from pathokd.errors import SlideError
from pathokd.slides.tiled import TiledPage, opaque
from pathokd.types import Rgb

# Of a truncated file it logs a line for every page it cannot find; `SlideError` says what is wrong in one sentence.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

WHOLE_LEVEL_BYTES = 2**30
"""A level that is not tiled is decoded whole; beyond this size that would eat the machine, so it is
refused."""

_P = tifffile.PHOTOMETRIC
_FOREIGN = (_P.SEPARATED, _P.CIELAB, _P.ICCLAB, _P.ITULAB, _P.MINISWHITE)
"""Three or four channels that are none of RGB."""

UM_PER_UNIT = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
"""Length units of OME-XML; microns by the micro sign that the schema asks for, or by the Greek letter."""


class TiffReader:
    """An RGB TIFF opened by tifffile: tile by tile where the file is tiled, level by level where it is
    not."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = tifffile.TiffFile(path)
            self._parse(path)
        except SlideError:
            raise
        except Exception as error:  # a damaged file raises whatever the parser ran into
            raise SlideError(
                f"{path} is of no format that OpenSlide or tifffile reads ({error}): "
                "expected a whole slide (SVS, NDPI, MRXS, SCN, DICOM, ...) or an RGB TIFF."
            ) from error

    def _parse(self, path: Path) -> None:
        series = list(self._file.series)
        if not series:
            raise SlideError(
                f"{path} begins as a TIFF and holds no image: it is cut off or damaged; copy it again from its source."
            )
        sides = [_size(each) if {"X", "Y"} <= set(each.axes) else (0, 0) for each in series]
        number = max(range(len(series)), key=lambda i: sides[i][0] * sides[i][1])  # labels and macros may come first
        self._levels = [_check_rgb(level, path) for level in series[number].levels]
        sizes = [_size(level) for level in self._levels]
        self.dimensions = sizes[0]
        self.level_dimensions = tuple(sizes)
        self.level_downsamples = tuple((sizes[0][0] / width + sizes[0][1] / height) / 2 for width, height in sizes)
        first = self._levels[0].pages[0]
        self.vendor = "ome-tiff" if self._file.is_ome else "tifffile"
        self.properties: Mapping[str, str] = _properties(self._file, first, number)
        self.associated_images = tuple(s.name or f"series {i}" for i, s in enumerate(series) if i != number)
        self.icc_profile = _tag(first, "InterColorProfile")
        self._tiled = [TiledPage(level.pages[0]) if _has_rgb_tiles(level) else None for level in self._levels]
        self._whole: dict[int, Rgb] = {}

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Rgb:
        """Pixels at `location` (level-0 top-left), snapped to the level's grid, white outside the image."""
        down = self.level_downsamples[level]
        x, y = (round(c / down) for c in location)
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        width, height = self.level_dimensions[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size[0], width), min(y + size[1], height)
        if x0 < x1 and y0 < y1:
            try:
                out[y0 - y : y1 - y, x0 - x : x1 - x] = self._box(level, x0, y0, x1, y1)
            except (ValueError, RuntimeError, OSError, tifffile.TiffFileError) as error:
                # imagecodecs' errors are RuntimeErrors; a missing codec is a ValueError.
                raise SlideError(str(error)) from error
        return out

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _box(self, level: int, x0: int, y0: int, x1: int, y1: int) -> Rgb:
        tiled = self._tiled[level]
        if tiled is None:
            return self._whole_level(level)[y0:y1, x0:x1]
        return tiled.read(x0, y0, (x1 - x0, y1 - y0))

    def _whole_level(self, level: int) -> Rgb:
        if level not in self._whole:
            width, height = self.level_dimensions[level]
            if 3 * width * height > WHOLE_LEVEL_BYTES:
                raise SlideError(
                    f"its {width} x {height} pixels are stored in strips, not tiles, "
                    "and do not fit into memory; convert it to a tiled pyramidal TIFF"
                )
            series = self._levels[level]
            pixels = series.asarray()
            if series.axes.index("S" if "S" in series.axes else "C") == 0:
                pixels = np.moveaxis(pixels, 0, -1)
            self._whole[level] = opaque(pixels, series.pages[0])
        return self._whole[level]


def _check_rgb(series: Any, path: Path) -> Any:
    """Accept 8-bit colour images of one plane; say what came otherwise."""
    axes, shape = series.axes, series.shape
    colour = "S" if "S" in axes else "C"
    channels = shape[axes.index(colour)] if colour in axes else 1
    flat = sorted(axes) == sorted(f"YX{colour}")
    if series.dtype != np.uint8 or channels not in (3, 4) or not flat:
        raise SlideError(
            f"{path} holds {axes} = {'x'.join(map(str, shape))} of {series.dtype}: "
            "expected one 8-bit RGB image; export the brightfield image as RGB."
        )
    page = series.pages[0].aspage()
    # Decoders of JPEG turn YCbCr into RGB; nobody does so for other compressions.
    foreign = page.photometric in _FOREIGN or (page.photometric == _P.YCBCR and not _is_jpeg(page))
    if foreign:
        raise SlideError(
            f"{path} stores its colours as {_P(page.photometric).name}, expected RGB: export the image as RGB."
        )
    return series


def _is_jpeg(page: Any) -> bool:
    return "JP" in tifffile.COMPRESSION(page.compression).name


def _size(series: Any) -> tuple[int, int]:
    return series.shape[series.axes.index("X")], series.shape[series.axes.index("Y")]


def _has_rgb_tiles(series: Any) -> bool:
    page = series.pages[0]
    return bool(page.is_tiled and page.planarconfig == 1 and series.axes == "YXS")


def _properties(file: Any, page: Any, series: int) -> dict[str, str]:
    """Resolution facts of a series and its first page under OpenSlide's names, so that mpp is resolved in one place."""
    found: dict[str, str] = {}
    unit = _tag(page, "ResolutionUnit")
    if unit is not None:
        found["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(int(unit), "none")
    for name in ("XResolution", "YResolution"):
        value = _tag(page, name)
        if value is not None and value[1]:
            found[f"tiff.{name}"] = repr(value[0] / value[1])
    if file.is_ome:
        found.update(_ome_properties(file.ome_metadata, series))
    return found


def _ome_properties(xml: str, series: int) -> dict[str, str]:
    """Physical pixel size and objective power of one image of an OME-XML."""
    root = ET.fromstring(xml)
    found: dict[str, str] = {}
    images = root.findall("{*}Image")
    image = images[series] if series < len(images) else root
    pixels = image.find(".//{*}Pixels")
    if pixels is not None:
        for axis in "XY":
            value = pixels.get(f"PhysicalSize{axis}")
            factor = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "um"))
            if value is not None and factor is not None:
                found[f"ome.PhysicalSize{axis}"] = repr(float(value) * factor)
    used = image.find(".//{*}ObjectiveSettings")
    objectives = root.findall(".//{*}Objective")
    named = [each for each in objectives if used is None or each.get("ID") == used.get("ID")]
    power = named[0].get("NominalMagnification") if named else None
    if power is not None:
        found["openslide.objective-power"] = power
    return found


def _tag(page: Any, name: str) -> Any:
    tag = page.tags.get(name)
    return None if tag is None else tag.value
