"""Fixtures that every floor shares."""

import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch

from pathokd.phantom import write_pyramid
from pathokd.slides.manifest import TileManifest, TileSpec

hypothesis.settings.register_profile("pathokd", deadline=None)  # a slow machine is no defect
hypothesis.settings.load_profile("pathokd")


def pytest_configure(config: pytest.Config) -> None:
    """Under `pytest -n`, each process of tests, and what it starts, keeps to one core."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """`-n auto` on a large machine: each process holds a torch of its own in memory."""
    return min(8, (yield))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slides and tiles, named by PATHOKD_REAL_DATA (`.ci/run` sets it); skips the test without it."""
    folder = os.environ.get("PATHOKD_REAL_DATA")
    if not folder:
        pytest.skip("needs real slides: set PATHOKD_REAL_DATA to a copy of shared/data")
    path = Path(folder)
    if not (path / "README.md").is_file():
        pytest.fail(f"PATHOKD_REAL_DATA={folder} holds no README.md: it should be a copy of shared/data")
    return path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder of 48 tiles of 64 px: two stains of grainy colour, one slide a patient."""
    from pathokd.data.pack import PackSpec, pack_tiles

    folder = tmp_path_factory.mktemp("tiles")
    pack_tiles(write_manifest(folder), folder / "packed", PackSpec(shard_tiles=20), workers=1)
    return folder / "packed"


def write_manifest(folder: Path, slides: int = 3) -> Path:
    """Small slides of random blobs, and the manifest of their tiles (16 a slide)."""
    import cv2

    rows = []
    for number in range(slides):
        rng = np.random.default_rng(number)
        blobs = cv2.resize(rng.integers(60, 250, (32, 32, 3), dtype=np.uint8), (256, 256))
        path = folder / f"slide {number}.é.tif"
        write_pyramid(path, blobs, 0.5)
        rows += [
            {"slide_id": f"slide {number}.é", "path": str(path), "x": x, "y": y, "patient": f"p{number}"}
            for x in range(0, 256, 64)
            for y in range(0, 256, 64)
        ]
    frame = pd.DataFrame(rows).assign(mpp=0.5, mpp_level0=0.5, tile_px=64, tissue_fraction=1.0, flag="")
    TileManifest(frame, TileSpec(tile_px=64)).write(folder / "manifest.parquet")
    return folder / "manifest.parquet"


@pytest.fixture(scope="session")
def registered_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder of three cases of 16 places, each place under two stainings and two scanners; 64 px tiles."""
    import cv2

    from pathokd.data.pack import PackSpec, pack_tiles

    folder, rows = tmp_path_factory.mktemp("registered"), []
    for case in range(3):
        rng = np.random.default_rng(case)
        blobs = cv2.resize(rng.integers(60, 250, (32, 32, 3), dtype=np.uint8), (256, 256)).astype(np.float32)
        for stain, colour in (("HE", (1.0, 0.8, 0.95)), ("violet", (0.8, 0.7, 1.0))):
            for scanner, gain in (("S50", 1.0), ("S45", 0.85)):
                slide = f"c{case}_{stain}_{scanner}"
                write_pyramid(folder / f"{slide}.tif", (blobs * np.float32(colour) * gain).astype(np.uint8), 0.5)
                rows += [
                    {"slide_id": slide, "path": str(folder / f"{slide}.tif"), "x": x, "y": y, "case": f"c{case}",
                     "stain": stain, "scanner": scanner, "patient": f"p{case}"}
                    for x in range(0, 256, 64) for y in range(0, 256, 64)
                ]  # fmt: skip
    frame = pd.DataFrame(rows).assign(mpp=0.5, mpp_level0=0.5, tile_px=64, tissue_fraction=1.0, flag="")
    TileManifest(frame, TileSpec(tile_px=64)).write(folder / "manifest.parquet")
    pack_tiles(folder / "manifest.parquet", folder / "packed", PackSpec(), workers=1)
    return folder / "packed"


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT with registers for 32 px, exported as a folder."""
    from pathokd.export import export_student
    from pathokd.models import StudentSpec, build_student

    args = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "reg_tokens": 2}
    encoder = build_student(StudentSpec("vit_tiny_patch16_224", args, image_px=32, mpp=0.5, seed=7))
    return export_student(encoder, tmp_path_factory.mktemp("teacher") / "tiny", licence="MIT")


@pytest.fixture(scope="session")
def tiny_prototypes(tiny_teacher: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fixed prototypes of that teacher."""
    from pathokd.data.wsi import open_tiles
    from pathokd.distill.prototype_fit import PrototypeSpec, fit_prototypes
    from pathokd.models.teacher import TeacherSpec, build_teacher

    folder = tmp_path_factory.mktemp("prototypes")
    fit_prototypes(
        build_teacher(TeacherSpec(str(tiny_teacher))), open_tiles(packed), folder, PrototypeSpec(8), workers=0
    )
    return folder
