"""From a map of classes over a slide to one label per tile."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pathokd.errors import ManifestError
from pathokd.slides.integral import box_sums, integral
from pathokd.types import IntArray, Microns, Mpp

LabelImage = npt.NDArray[np.uint8]


class LabelMap(NamedTuple):
    """Classes over a slide."""

    classes: LabelImage
    """shape (height, width): index into `names`."""
    mpp: Mpp
    """Microns per map pixel; the map's top-left corner is the slide's."""
    names: tuple[str, ...]


class TileLabels(NamedTuple):
    """One label per tile."""

    label: npt.NDArray[np.int64]
    """Class that covers most of the tile; the lower index wins a tie. -1 where the map does not reach."""
    share: npt.NDArray[np.float64]
    """Share of the tile's area that this class covers, 0 to 1; area outside the map counts for no class."""


def tile_labels(
    label_map: LabelImage, map_mpp: Mpp, x: IntArray, y: IntArray, mpp_level0: Mpp, tile_um: Microns
) -> TileLabels:
    """Majority class of each tile, by exact area.

    Args:
        label_map: class indices, shape (height, width).
        map_mpp: microns per map pixel.
        x: left edges of tiles in level-0 pixels, shape (n,).
        y: top edges of tiles in level-0 pixels, shape (n,).
        mpp_level0: microns per level-0 pixel.
        tile_um: side of a tile in microns.
    """
    factor = mpp_level0 / map_mpp
    left, top, side = np.asarray(x) * factor, np.asarray(y) * factor, tile_um / map_mpp
    classes = np.unique(label_map)
    areas = np.stack([box_sums(integral(label_map == c), left, top, side, side) for c in classes])
    best = areas.argmax(axis=0)
    share = np.clip(np.take_along_axis(areas, best[None], axis=0)[0] / side**2, 0.0, 1.0)
    return TileLabels(np.where(share > 0, classes[best].astype(np.int64), -1), share)


def label_map_files(path: str | Path) -> tuple[Path, Path]:
    """The two files of a class map: the picture, and what its classes mean."""
    return Path(path), Path(path).with_suffix(".json")


def read_label_map(path: str | Path) -> LabelMap:
    """Read a class map: `X.png` with `X.json` = {"mpp": 4.0, "classes": ["background", "stroma", ...]} beside
    it.

    Raises:
        ManifestError: a file is missing or does not fit the other.
    """
    png, side = label_map_files(path)
    try:
        facts = json.loads(side.read_text(encoding="utf-8"))
        mpp, names = float(facts["mpp"]), tuple(map(str, facts["classes"]))
        if not 0 < mpp < float("inf"):
            raise ValueError(f"mpp is {mpp}")
        with Image.open(png) as image:
            classes = np.asarray(image)
    except FileNotFoundError as error:
        raise ManifestError(
            f"Label map {png} needs {png.name} and {side.name}: {error.filename} is missing."
        ) from error
    except Image.DecompressionBombError as error:
        raise ManifestError(f"Label map {png} is too large ({error}): save it at a coarser mpp, say 4.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"Label map {png} cannot be read ({type(error).__name__}: {error}): "
            f"expected a greyscale PNG and {side.name} "
            'with {"mpp": microns per pixel, "classes": [names]}.'
        ) from error
    if classes.ndim != 2 or classes.dtype != np.uint8:
        raise ManifestError(
            f"Label map {png} has shape {classes.shape} of {classes.dtype}: expected one 8-bit class index per pixel."
        )
    if classes.size and int(classes.max()) >= len(names):
        raise ManifestError(f"Label map {png} holds class {classes.max()}, but {side.name} names {len(names)} classes.")
    return LabelMap(classes, mpp, names)
