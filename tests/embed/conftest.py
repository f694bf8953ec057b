"""A small real slide, its tiles and a small real encoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch

from pathokd.models import Encoder, StudentSpec, build_student
from pathokd.slides.manifest import TileManifest, TileSpec, typed

TILE_PX = 56
SIDE = 4 * TILE_PX


def write_slide(path: Path, seed: int, *, mpp: float | None = 0.5, corrupt: bool = False) -> Path:
    """A tiled TIFF of 4 x 4 coloured tiles; `corrupt` spoils the bytes of its first storage tile."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 250, (4, 4, 3)).repeat(TILE_PX, 0).repeat(TILE_PX, 1)
    pixels = np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", compression="deflate", **resolution)
    if corrupt:
        with tifffile.TiffFile(path) as tiff:
            offset = tiff.pages.first.dataoffsets[0]
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * 400)
    return path


def manifest_of(paths: list[Path]) -> TileManifest:
    """Every tile of every slide, as `pathokd tile` would list them."""
    rows = [
        {
            "slide_id": path.stem,
            "path": str(path),
            "x": x,
            "y": y,
            "mpp": 0.5,
            "mpp_level0": 0.5,
            "tile_px": TILE_PX,
            "tissue_fraction": 0.75,
            "flag": "",
        }
        for path in paths
        for y in range(0, SIDE, TILE_PX)
        for x in range(0, SIDE, TILE_PX)
    ]
    return TileManifest(typed(pd.DataFrame(rows)), TileSpec(mpp=0.5, tile_px=TILE_PX))


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    torch.manual_seed(0)
    spec = StudentSpec(
        architecture="vit_tiny_patch16_224",
        model_args={"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 14, "reg_tokens": 4},
        image_px=TILE_PX,
        init="scratch",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        mpp=0.5,
    )
    return build_student(spec, None).eval()


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """Write `NAME.tiff` into the test's folder."""
    return lambda name, **options: write_slide(tmp_path / f"{name}.tiff", **options)


@pytest.fixture
def make_manifest() -> Callable[[list[Path]], TileManifest]:
    return manifest_of
