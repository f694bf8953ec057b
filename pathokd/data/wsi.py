"""Tiles straight from slides, for when packing them first is not worth it."""

import functools
import re
import threading
from pathlib import Path
from typing import Any

import pandas as pd

from pathokd.data.batch import TileSource
from pathokd.data.packed import INDEX_NAME, PackedTiles
from pathokd.errors import ManifestError, SlideError
from pathokd.slides.manifest import TileManifest
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

MANIFEST_NAME = "manifest.parquet"
OPEN_SLIDES = 64
"""Slides kept open at a time; the least recently used is closed."""


class WsiTiles:
    """Random access to the tiles of a manifest, read from the slides.

    Args:
        manifest: rows flagged as bad are left out.

    Raises:
        ManifestError: no good tile is left.
    """

    def __init__(self, manifest: TileManifest) -> None:
        frame = manifest.frame[manifest.frame["flag"] == ""].reset_index(drop=True)
        if frame.empty:
            raise ManifestError("The manifest holds no good tiles: lower --min-tissue or look at its summary.csv.")
        frame.insert(0, "key", tile_keys(frame))
        self._frame, self.spec = frame, manifest.spec
        self._paths = frame["path"].to_list()
        self._x, self._y = frame["x"].to_numpy(), frame["y"].to_numpy()
        self._mpp, self._mpp_level0 = frame["mpp"].to_numpy(), frame["mpp_level0"].to_numpy()
        self._open()

    def _open(self) -> None:
        self._slides = functools.lru_cache(OPEN_SLIDES)(self._slide)
        self._lock = threading.Lock()

    def _slide(self, path: str, mpp: float) -> Slide:
        return Slide(path, mpp=mpp, icc=self.spec.icc)

    @property
    def index(self) -> pd.DataFrame:
        """One row per tile: the manifest's columns and `key`."""
        return self._frame

    def __len__(self) -> int:
        return len(self._frame)

    def read(self, row: int) -> Rgb:
        """The tile in `row`, uint8 (tile_px, tile_px, 3).

        Raises:
            SlideError: it cannot be read.
        """
        with self._lock:  # only for the table of open slides, not for reading
            slide = self._slides(self._paths[row], float(self._mpp_level0[row]))
        return slide.read_tile(
            int(self._x[row]),
            int(self._y[row]),
            mpp=float(self._mpp[row]),
            tile_px=self.spec.tile_px,
            allow_upsampling=self.spec.allow_upsampling,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_slides", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def tile_keys(frame: pd.DataFrame) -> list[str]:
    """A unique name per tile without dots or slashes (WebDataset cuts names at the first dot)."""
    names = (frame["slide_id"] + "-" + frame["x"].astype(str) + "-" + frame["y"].astype(str)).to_list()
    keys = [re.sub(r"[./\\\s]+", "_", name) for name in names]
    if len(set(keys)) == len(keys):
        return keys
    return [f"{key}-{row}" for row, key in enumerate(keys)]


def read_manifest(path: str | Path) -> TileManifest:
    """Read a tile manifest: the file, or the folder that `pathokd tile` wrote.

    Raises:
        ManifestError: there is none.
    """
    path = Path(path)
    return TileManifest.read(path / MANIFEST_NAME if path.is_dir() else path)


def holds_tiles(path: str | Path) -> bool:
    """Whether `open_tiles` will find tiles there."""
    folder = Path(path)
    return any((folder / name).is_file() for name in (INDEX_NAME, MANIFEST_NAME)) or folder.suffix == ".parquet"


def open_tiles(path: str | Path) -> TileSource:
    """Open a packed folder or its index, or the manifest of a tile folder, whichever `path` is.

    Raises:
        ManifestError: it is neither.
    """
    folder = Path(path)
    if folder.name == INDEX_NAME and folder.is_file():
        folder = folder.parent
    if (folder / INDEX_NAME).is_file():
        return PackedTiles(folder)
    if (folder / MANIFEST_NAME).is_file() or folder.suffix == ".parquet":
        return WsiTiles(read_manifest(folder))
    raise ManifestError(
        f"{path} holds no tiles: expected a packed folder (`pathokd pack`) or a tile folder (`pathokd tile`)."
    )


def read_or_advise(source: TileSource, row: int) -> Rgb:
    """The tile in `row`, where one that is left out would be missed.

    Raises:
        SlideError: it cannot be read; the message says what leaves such tiles out.
    """
    try:
        return source.read(row)
    except SlideError as error:
        said = str(error).rstrip(".")
        raise SlideError(
            f"{said}. `pathokd pack` leaves such tiles out and lists them: use the folder it writes."
        ) from error
