"""A registered cohort as real files: two cases, two stainings, two scanners of different mpp, packed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.models import Encoder, StudentSpec, build_student
from pathokd.slides.manifest import TileManifest, TileSpec, typed

TILE_PX = 56
TILES = 6
"""Tiles per side of a slide."""
COLOURS = {"stroma": (230, 150, 190), "tumour": (130, 80, 170), "fat": (245, 240, 235)}
STAINS = {"HE": (1.0, 1.0, 1.0), "violet": (0.8, 0.75, 1.0)}
SCANNERS = {"S50": 0.5, "S25": 0.25}
"""Scanner to microns per level-0 pixel."""


def tissue(case: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels at 0.5 um and the class of each tile; texture makes every place unique."""
    rng = np.random.default_rng(case)
    names = np.array(sorted(COLOURS))
    labels = names[np.arange(TILES * TILES) % len(names)].reshape(TILES, TILES)
    colour = np.array([[COLOURS[name] for name in row] for row in labels], float)
    pixels = colour.repeat(TILE_PX, 0).repeat(TILE_PX, 1)
    texture = rng.normal(0, 18, (TILES * 7, TILES * 7, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(pixels + texture, 0, 255), labels


def write_cohort(folder: Path) -> TileManifest:
    rows = []
    for case in range(2):
        pixels, labels = tissue(case)
        for stain, tint in STAINS.items():
            for scanner, mpp0 in SCANNERS.items():
                zoom = round(0.5 / mpp0)
                scan = (pixels * tint).astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
                path = folder / f"c{case}_{stain}_{scanner}.tiff"
                tifffile.imwrite(
                    path,
                    scan,
                    tile=(64, 64),
                    photometric="rgb",
                    compression="deflate",
                    resolution=(1e4 / mpp0, 1e4 / mpp0),
                    resolutionunit="CENTIMETER",
                )
                rows += [
                    {
                        "slide_id": path.stem,
                        "path": str(path),
                        "x": column * TILE_PX * zoom,
                        "y": row * TILE_PX * zoom,
                        "mpp": 0.5,
                        "mpp_level0": mpp0,
                        "tile_px": TILE_PX,
                        "tissue_fraction": 1.0,
                        "flag": "",
                        "case": f"c{case}",
                        "stain": stain,
                        "scanner": scanner,
                        "label": labels[row, column],
                        "label_share": 1.0,
                    }
                    for row in range(TILES)
                    for column in range(TILES)
                ]
    return TileManifest(typed(pd.DataFrame(rows)), TileSpec(mpp=0.5, tile_px=TILE_PX))


@pytest.fixture
def slides(tmp_path: Path) -> TileManifest:
    """The cohort as slides of its own, which may be changed."""
    return write_cohort(tmp_path)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedTiles:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder).write(folder / "tiles" / "manifest.parquet")
    pack_tiles(folder / "tiles", folder / "packed", PackSpec(quality=0))
    return PackedTiles(folder / "packed")


def small_vit(seed: int, width: int = 48) -> Encoder:
    spec = StudentSpec(
        architecture="vit_tiny_patch16_224",
        model_args={"depth": 2, "embed_dim": width, "num_heads": 3, "patch_size": 14, "reg_tokens": 4},
        image_px=TILE_PX,
        init="scratch",
        mean=(0.7, 0.6, 0.7),
        std=(0.2, 0.2, 0.2),
        mpp=0.5,
        seed=seed,
    )
    return build_student(spec, None).eval()


@pytest.fixture(scope="session")
def encoders() -> dict[str, Encoder]:
    return {"teacher": small_vit(0, 96), "student": small_vit(1)}
