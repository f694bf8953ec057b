"""Images of every kind, token grids, and a whole slide in memory that equals the cohort run's file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathokd.embed import Embedder, embed_slides, read_embeddings
from pathokd.errors import SlideError, StoreError
from pathokd.models import Encoder
from pathokd.phantom import make_scene, render, write_pyramid
from pathokd.slides import TileSpec, find_slides, tile_slides
from pathokd.types import Rgb


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = render(make_scene(4, 260.0, margin_um=20.0, region_um=90.0), "HE", "S50")
    return write_pyramid(tmp_path_factory.mktemp("slide") / "one.tif", image, 0.5)


@pytest.fixture
def tiles() -> list[Rgb]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8))


def test_images_may_come_as_anything(encoder: Encoder, tiles: list[Rgb], tmp_path: Path) -> None:
    embedder = Embedder(encoder, batch_size=2)
    expected = embedder(np.stack(tiles))
    paths = []
    for number, tile in enumerate(tiles):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(tile).save(paths[-1])
    stacked = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
    for images in (
        tiles,
        [Image.fromarray(tile) for tile in tiles],
        paths,
        stacked,
        [str(paths[0]), tiles[1], stacked[2]],
    ):
        np.testing.assert_array_equal(embedder(images), expected)


def test_tokens_are_the_encoders_patches(encoder: Encoder, tiles: list[Rgb]) -> None:
    embedder = Embedder(encoder, batch_size=2)
    grid = embedder.tokens(tiles)
    with torch.no_grad():
        features = encoder(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2))
    rows, columns = features.grid
    assert grid.shape == (3, rows, columns, encoder.embed_dim)
    np.testing.assert_allclose(grid[1, 0, 1], features.patches[1, 1].numpy(), atol=1e-5)
    np.testing.assert_allclose(grid[2, 1, 0], features.patches[2, columns].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="at least one image"):
        embedder.tokens([])


@pytest.mark.parametrize("wrong", [np.zeros((56, 56), np.uint8), np.zeros((56, 56, 3)), 3])
def test_what_is_no_image_is_named(encoder: Encoder, wrong: object) -> None:
    with pytest.raises(ValueError, match="each image should be uint8 RGB"):
        Embedder(encoder)([wrong])  # type: ignore[list-item]
    with pytest.raises(StoreError, match="There is no image"):
        Embedder(encoder)(["none.png"])


@pytest.mark.filterwarnings("ignore:.*expects:UserWarning")
def test_a_slide_equals_the_cohort_run(encoder: Encoder, scan: Path, tmp_path: Path) -> None:
    found = Embedder(encoder, "cls+mean").slide(scan, mpp=0.5, tile_px=56)
    tile_slides(find_slides(scan), TileSpec(mpp=0.5, tile_px=56), tmp_path / "tiles")
    embed_slides(encoder, tmp_path / "tiles", tmp_path / "out", readout="cls+mean")
    stored = read_embeddings(tmp_path / "out/one.h5")
    np.testing.assert_array_equal(found.coords, stored.coords)
    np.testing.assert_allclose(found.features, stored.features, atol=1e-5)
    found.save(tmp_path / "saved.h5")
    saved = read_embeddings(tmp_path / "saved.h5")
    assert saved.header == stored.header
    assert saved.coords_attrs.keys() == stored.coords_attrs.keys()
    assert saved.features_attrs == stored.features_attrs
    np.testing.assert_array_equal(saved.features, found.features)


@pytest.mark.filterwarnings("ignore:.*expects:UserWarning")
def test_the_map_lies_on_the_tissue(encoder: Encoder, scan: Path) -> None:
    found = Embedder(encoder).slide(scan, mpp=0.5, tile_px=56)
    picture = found.heatmap(max_px=260)
    assert picture.shape == (260, 260, 3)
    values = np.arange(len(found.features), dtype=float)
    ramp = found.heatmap(values, max_px=260)
    scale = 260 / 520
    x, y = ((found.coords[-1] + 28) * scale).astype(int)
    assert ramp[y, x].tolist() == [253, 231, 37]  # the yellow end of viridis
    assert np.abs(ramp[2, 2].astype(int) - 250).max() < 10  # glass, faded
    with pytest.raises(ValueError, match="one number per tile"):
        found.heatmap(values[:-1])
    with pytest.raises(ValueError, match="values of good tiles should be finite"):
        found.heatmap(np.where(np.arange(len(values)) == 1, np.nan, values))


def test_a_card_that_does_not_fit_is_said(encoder: Encoder, scan: Path) -> None:
    with pytest.warns(UserWarning, match="expects"):
        Embedder(encoder).slide(scan, mpp=1.0, tile_px=56)


@pytest.mark.filterwarnings("ignore:.*expects:UserWarning")
def test_a_slide_without_tissue_is_said(encoder: Encoder, tmp_path: Path) -> None:
    glass = write_pyramid(tmp_path / "glass.tif", np.full((300, 300, 3), 244, np.uint8), 0.5)
    with pytest.raises(SlideError, match="holds no tile with 25% tissue"):
        Embedder(encoder).slide(glass, mpp=0.5, tile_px=56)


@pytest.mark.filterwarnings("ignore:.*expects:UserWarning")
def test_an_anndata_of_the_good_tiles(encoder: Encoder, scan: Path) -> None:
    pytest.importorskip("anndata", reason="pip install anndata")
    found = Embedder(encoder).slide(scan, mpp=0.5, tile_px=56)
    found.flags[1], found.features[1] = "unreadable", np.nan
    made = found.to_anndata()
    np.testing.assert_array_equal(made.X, found.features[found.good])
    np.testing.assert_array_equal(made.obsm["spatial"], found.coords[found.good] + 28.0)
    assert made.uns["pathokd"]["path"] == str(scan)
    assert made.uns["pathokd"]["flagged"]["flag"].tolist() == ["unreadable"]
