"""The yardstick for reading: one OpenSlide handle, two threads, `read_region`, RGB, and the resize the tile needs.

Usage: python read_openslide.py JOB.json, written by `test_reading.py`. Nothing is encoded or written.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import pandas as pd

from pathokd.slides.pyramid import choose_level, read_window

THREADS = 2


def main(job: dict) -> None:
    rows = pd.read_parquet(job["manifest"])
    side, mpp, mpp_level0 = int(rows.tile_px[0]), float(rows.mpp[0]), float(rows.mpp_level0[0])
    places = list(zip(rows.x.tolist(), rows.y.tolist(), strict=True))

    start = time.perf_counter()
    slide = openslide.OpenSlide(rows.path[0])
    level, scale = choose_level(slide.level_downsamples, mpp / mpp_level0)
    window, resize = read_window(scale, (side, side))

    def read(place: tuple[int, int]) -> np.ndarray:
        tile = np.asarray(slide.read_region(place, level, window).convert("RGB"))
        if resize:
            shrunk = cv2.resize(tile, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_AREA)
            tile = np.ascontiguousarray(shrunk[:side, :side])
        return tile

    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(tile.shape == (side, side, 3) for tile in pool.map(read, places))
    seconds = time.perf_counter() - start
    Path(job["out"]).write_text(json.dumps({"tiles": total, "seconds": seconds, "resize": resize}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
