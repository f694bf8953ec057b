"""Packed tiles: tar shards that WebDataset reads in sequence and `PackedTiles` reads at random.

A packed folder holds `shard-000000.tar`, ... (each tile as `KEY.jpg` with `KEY.json` beside it) and `index.parquet`:
one row per tile with `key`, `shard`, `offset`, `size` and the manifest's columns. Offsets point at the image bytes
within the shard, so one `pread` fetches one tile.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from pathokd.errors import ManifestError, StoreError
from pathokd.files import Header
from pathokd.slides.manifest import BROKEN_TABLE, HEADER_KEY
from pathokd.types import Rgb

SCHEMA = "packed/1"
INDEX_NAME = "index.parquet"
INDEX_COLUMNS = ("key", "shard", "offset", "size")


def read_index(path: Path) -> tuple[pd.DataFrame, Header]:
    """Read a packed index and its header.

    Raises:
        ManifestError: there is no such file, or it is not a packed index.
    """
    try:
        table = pq.read_table(path)
        frame: pd.DataFrame = table.to_pandas()
    except FileNotFoundError:
        raise ManifestError(
            f"{path.parent} is no packed folder: it holds no {path.name}; make one with `pathokd pack`."
        ) from None
    except BROKEN_TABLE as error:
        raise ManifestError(f"{path} is no readable Parquet file ({error}): run `pathokd pack` again.") from error
    raw = (table.schema.metadata or {}).get(HEADER_KEY)
    missing = [name for name in INDEX_COLUMNS if name not in table.column_names]
    if raw is None or missing:
        raise ManifestError(f"{path} is no packed index: expected a pathokd header and the columns {INDEX_COLUMNS}.")
    try:
        header: Header = json.loads(raw)
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}): run `pathokd pack` again.") from error
    if header.get("schema") != SCHEMA:
        raise ManifestError(f"{path} has schema {header.get('schema')!r}, this version reads {SCHEMA!r}: pack again.")
    return frame, header


def decode(encoded: bytes, name: str) -> Rgb:
    """Decode a JPEG or PNG tile to RGB.

    Raises:
        StoreError: the bytes are no image.
    """
    bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if encoded else None
    if bgr is None:
        raise StoreError(f"{name} is no readable image: the shard is damaged, run `pathokd pack --overwrite`.")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


class PackedTiles:
    """Random access to a packed folder.

    Threads share one file handle per shard (`pread` keeps no position); pickled or forked copies open their own.

    Args:
        folder: what `pathokd pack` wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._index, self.header = read_index(self.folder / INDEX_NAME)
        self._keys = self._index["key"].to_list()
        self._shards = self._index["shard"].to_list()
        self._offsets = self._index["offset"].to_numpy()
        self._sizes = self._index["size"].to_numpy()
        self._open()

    def _open(self) -> None:
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def index(self) -> pd.DataFrame:
        """One row per tile: where it lies, and the manifest's columns."""
        return self._index

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"PackedTiles({str(self.folder)!r}, {len(self)} tiles)"

    def read_encoded(self, row: int) -> bytes:
        """The stored bytes of the tile in `row`, undecoded."""
        size = int(self._sizes[row])
        encoded = os.pread(self._handle(self._shards[row]), size, int(self._offsets[row]))
        if len(encoded) != size:
            raise StoreError(
                f"{self.folder / self._shards[row]} ends in the middle of a tile: it is truncated, "
                "run `pathokd pack --overwrite`."
            )
        return encoded

    def read(self, row: int) -> Rgb:
        """The tile in `row`, uint8 (height, width, 3)."""
        return decode(self.read_encoded(row), f"Tile {self._keys[row]} of {self.folder}")

    def _handle(self, shard: str) -> int:
        if self._pid != os.getpid():
            self._open()
        handle = self._handles.get(shard)
        if handle is None:
            with self._lock:
                handle = self._handles.get(shard)
                if handle is None:
                    try:
                        handle = os.open(self.folder / shard, os.O_RDONLY)
                    except FileNotFoundError:
                        raise StoreError(
                            f"{self.folder / shard} is missing although the index names it: "
                            "copy it back or run `pathokd pack --overwrite`."
                        ) from None
                    self._handles[shard] = handle
        return handle

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        if self._pid == os.getpid():
            for handle in self._handles.values():
                os.close(handle)
        self._open()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_lock", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
