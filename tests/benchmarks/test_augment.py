"""Milliseconds per 224 px tile of stain augmentation, and of the whole student view, in one process on one thread.

Contenders take turns on the same real tiles (or phantom tiles without PATHOKD_REAL_DATA); the figure is the median over
all calls. Everything but D4 runs through the interface a user calls. torchstain normalises and scikit-image converts,
perturbs and converts back, which is what their users do to augment.
"""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from pathokd.augment import HEDJitter, StainJitter, StainSwap, StudentView
from pathokd.data.batch import Draw
from pathokd.data.views import Geometry, Views
from pathokd.slides.slide import Slide
from pathokd.slides.tile import find_tissue
from pathokd.types import Rgb

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("PATHOKD_BENCH_ROUNDS", "5"))
TILES = int(os.environ.get("PATHOKD_BENCH_TILES", "60"))
SIDE = 224


@pytest.fixture(scope="module")
def tiles(bench_slide: Any) -> list[Rgb]:
    """Tiles with tissue, spread over the slide."""
    with Slide(bench_slide, mpp=0.499) as slide:
        overview = slide.overview(mpp=8.0)
        rows, columns = np.nonzero(find_tissue(overview, slide.mpp))
        picked = np.linspace(0, len(rows) - 1, TILES).astype(int)
        corners = [(int(columns[i] * overview.downsample), int(rows[i] * overview.downsample)) for i in picked]
        return [slide.read_tile(*corner, mpp=0.5, tile_px=SIDE) for corner in corners]


def contenders(target: Rgb) -> dict[str, Callable[[Rgb], Any]]:
    torchstain = pytest.importorskip("torchstain")
    from skimage.color import hed2rgb, rgb2hed

    rng = np.random.default_rng(0)
    macenko = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    macenko.fit(target)

    def hed_jitter(tile: Rgb) -> Any:
        hed = rgb2hed(tile) * rng.uniform(0.95, 1.05, 3) + rng.uniform(-0.05, 0.05, 3)
        return (hed2rgb(hed) * 255).astype(np.uint8)

    def transform(step: A.BasicTransform) -> Callable[[Rgb], Any]:
        pipeline = A.Compose([step], seed=0)
        return lambda tile: pipeline(image=tile)

    views = Views(Geometry(SIDE), {"student": [StudentView()]})
    draws = iter(range(10**9))
    return {
        "StainJitter": transform(StainJitter()),
        "StainJitter, Macenko basis": transform(StainJitter(basis="macenko")),
        "HEDJitter": transform(HEDJitter()),
        "StainSwap": transform(StainSwap()),
        "student view: D4, stain, scanner, JPEG": lambda tile: views(tile, Draw(next(draws), 0)),
        "torchstain Macenko (NumPy)": lambda tile: macenko.normalize(tile, stains=False),
        "scikit-image HED jitter": hed_jitter,
        "albumentations HEStain, Macenko": transform(A.HEStain(method="macenko", p=1.0)),
        "albumentations HEStain, preset": transform(A.HEStain(method="preset", p=1.0)),
    }


def test_stain_augmentation_is_cheap(tiles: list[Rgb], publish: Any, markdown: Any) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    runs = contenders(tiles[0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            for tile in tiles:
                started = time.perf_counter()
                try:
                    run(tile)
                except np.linalg.LinAlgError:
                    continue  # torchstain on a tile it cannot decompose
                if number:  # the first round warms up
                    times[name].append(time.perf_counter() - started)
    ms = {name: 1e3 * median(own) for name, own in times.items()}
    jitter = ms["StainJitter"]
    rows = [[name, f"{value:.2f}", f"{value / jitter:.1f}"] for name, value in ms.items()]
    table = markdown(["transform", "ms per tile, median", "times StainJitter"], rows)
    publish("augment", {"ms": ms, "tiles": len(tiles), "rounds": ROUNDS}, f"Augmentation, one thread\n\n{table}")
    assert ms["torchstain Macenko (NumPy)"] >= 3 * jitter
    assert ms["scikit-image HED jitter"] >= 3 * jitter
    assert ms["albumentations HEStain, Macenko"] >= 10 * jitter
    assert ms["student view: D4, stain, scanner, JPEG"] < 6.0
