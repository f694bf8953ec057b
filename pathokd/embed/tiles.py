"""The tiles of one slide through a model: read ahead by threads, flagged where they cannot be read."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.embed.images import Batch
from pathokd.embed.reading import read_batches
from pathokd.embed.speed import Spent
from pathokd.errors import SlideError, StoreError
from pathokd.progress import Bars
from pathokd.slides.manifest import TileSpec
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

UNREADABLE = "unreadable"
Encode = Callable[[Iterable[Batch], Spent], Iterator[npt.NDArray[np.float32]]]


class Reading(NamedTuple):
    """How tiles come to the model."""

    batch_size: int
    workers: int
    """Threads that read ahead."""


class _Read(NamedTuple):
    """A tile, or none where it cannot be read, and what it took."""

    tile: Rgb | None
    seconds: float
    cpu_seconds: float


def embed_tiles(
    encode: Encode,
    dim: int,
    slide: Slide,
    tiles: pd.DataFrame,
    spec: TileSpec,
    reading: Reading,
    bars: Bars,
    spent: Spent,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.object_]]:
    """Features and flags, one row per tile.

    Args:
        encode: From batches of images to their vectors, as `Embedder.stream`.
        dim: Length of a vector.
        slide: Open.
        tiles: Rows of a manifest; those flagged already are left alone.
        spec: How they were cut.
        reading: Batches and threads.
        bars: Where progress is shown.
        spent: Gets the seconds of each part.

    Returns:
        (n, dim), NaN for flagged rows, and (n,) flags.

    Raises:
        SlideError: Not one tile can be read.
        StoreError: The model returned NaN or infinity for a good tile.
    """
    x, y = tiles["x"].to_numpy(), tiles["y"].to_numpy()
    flag = tiles["flag"].to_numpy(dtype=object, copy=True)

    def read(row: int) -> _Read:
        started, cpu = time.perf_counter(), time.thread_time()
        try:
            tile = slide.read_tile(
                int(x[row]),
                int(y[row]),
                mpp=spec.mpp,
                tile_px=spec.tile_px,
                allow_upsampling=spec.allow_upsampling,
            )
        except SlideError:
            tile = None  # becomes a flagged row below
        return _Read(tile, time.perf_counter() - started, time.thread_time() - cpu)

    features = np.full((len(tiles), dim), np.nan, np.float32)
    rows = np.flatnonzero(flag == "").tolist()
    batches = read_batches(read, rows, batch_size=reading.batch_size, workers=reading.workers)
    total = -(-len(rows) // reading.batch_size)
    sent: deque[list[int]] = deque()

    def good_tiles() -> Iterator[list[Rgb]]:
        for batch in bars.track(spent.waiting(batches), str(tiles["slide_id"].iloc[0]), total, keep=False):
            spent.read_s += sum(read.seconds for _, read in batch)
            spent.read_cpu_s += sum(read.cpu_seconds for _, read in batch)
            flag[[row for row, read in batch if read.tile is None]] = UNREADABLE
            good = {row: read.tile for row, read in batch if read.tile is not None}
            if good:
                sent.append(list(good))
                yield list(good.values())

    for vectors in encode(good_tiles(), spent):
        features[sent.popleft()] = vectors
    if not (flag == "").any():
        raise SlideError(f"None of the {len(tiles)} tiles can be read: the slide is damaged, copy it again.")
    if not np.isfinite(features[flag == ""]).all():
        raise StoreError("The model returned NaN or infinity for good tiles: try fp32 or check the weights.")
    return features, flag
