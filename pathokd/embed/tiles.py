"""The tiles of one slide through a model: read ahead by threads, flagged where they cannot be read."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.embed.reading import read_batches
from pathokd.errors import SlideError, StoreError
from pathokd.progress import Bars
from pathokd.slides.manifest import TileSpec
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

UNREADABLE = "unreadable"
Encode = Callable[[Sequence[Rgb]], npt.NDArray[np.float32]]


class Reading(NamedTuple):
    """How tiles come to the model."""

    batch_size: int
    workers: int
    """Threads that read ahead."""


def embed_tiles(
    encode: Encode, dim: int, slide: Slide, tiles: pd.DataFrame, spec: TileSpec, reading: Reading, bars: Bars
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.object_]]:
    """Features and flags, one row per tile.

    Args:
        encode: From images to vectors.
        dim: Length of a vector.
        slide: Open.
        tiles: Rows of a manifest; those flagged already are left alone.
        spec: How they were cut.
        reading: Batches and threads.
        bars: Where progress is shown.

    Returns:
        (n, dim), NaN for flagged rows, and (n,) flags.

    Raises:
        SlideError: Not one tile can be read.
        StoreError: The model returned NaN or infinity for a good tile.
    """
    x, y = tiles["x"].to_numpy(), tiles["y"].to_numpy()
    flag = tiles["flag"].to_numpy(dtype=object, copy=True)

    def read(row: int) -> Rgb | None:
        try:
            return slide.read_tile(
                int(x[row]),
                int(y[row]),
                mpp=spec.mpp,
                tile_px=spec.tile_px,
                allow_upsampling=spec.allow_upsampling,
            )
        except SlideError:
            return None  # becomes a flagged row below

    features = np.full((len(tiles), dim), np.nan, np.float32)
    rows = np.flatnonzero(flag == "").tolist()
    batches = read_batches(read, rows, batch_size=reading.batch_size, workers=reading.workers)
    total = -(-len(rows) // reading.batch_size)
    for batch in bars.track(batches, str(tiles["slide_id"].iloc[0]), total, keep=False):
        good = {row: tile for row, tile in batch if tile is not None}
        flag[[row for row, tile in batch if tile is None]] = UNREADABLE
        if good:
            features[list(good)] = encode(list(good.values()))
    if not (flag == "").any():
        raise SlideError(f"None of the {len(tiles)} tiles can be read: the slide is damaged, copy it again.")
    if not np.isfinite(features[flag == ""]).all():
        raise StoreError("The model returned NaN or infinity for good tiles: try fp32 or check the weights.")
    return features, flag
