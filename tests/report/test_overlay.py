"""Sheets of slides: what is drawn where, colours that compare, resume, moved and other slides, and failures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pathokd.cli.main import main
from pathokd.embed import embed_slides, read_embeddings, write_embeddings
from pathokd.embed.painting import paint_tiles
from pathokd.errors import ManifestError, StoreError
from pathokd.phantom import make_scene, render, write_pyramid
from pathokd.report.overlay import draw_overlays
from pathokd.report.slide_sheet import Panel, bar_um, slide_sheet
from pathokd.slides import TileSpec, find_slides, tile_slides
from pathokd.slides.overview import Overview


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """Two phantom slides, one with a damaged corner, tiled and embedded."""
    root = tmp_path_factory.mktemp("cohort")
    (root / "slides").mkdir()
    for number, name in enumerate(("one", "two.é")):
        image = render(make_scene(4 + number, 260.0, margin_um=20.0, region_um=90.0), "HE", "S50")
        corrupt = [(0, 1, 1)] if number else []
        write_pyramid(root / f"slides/{name}.tif", image, 0.5, tile_px=128, corrupt=corrupt, downsamples=(4.0,))
    tile_slides(find_slides(root / "slides"), TileSpec(mpp=0.5, tile_px=64), root / "tiles")
    embed_slides(str(tiny_teacher), root / "tiles", root / "features")
    return root


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_every_slide_gets_a_sheet(cohort: Path, tmp_path: Path) -> None:
    summary = draw_overlays(cohort / "features", tmp_path / "out")
    assert summary["status"].to_list() == ["ok", "ok"]
    flagged = summary.set_index("slide_id")["n_flagged"]
    assert flagged["one"] == 0
    assert flagged["two.é"] > 0
    sheets = [picture(tmp_path / f"out/{name}.jpg") for name in ("one", "two.é")]
    red = [((s[..., 0] > 190) & (s[..., 1] < 60) & (s[..., 2] < 60)).sum() for s in sheets]
    assert red[1] > 50 * max(red[0], 1)  # crosses, and the legend that explains them
    assert all(((s[..., 1] > 120) & (s[..., 0] < 40) & (s[..., 2] < 100)).sum() > 500 for s in sheets)  # outlines


def test_tiles_have_the_colours_of_the_folder(cohort: Path, tmp_path: Path) -> None:
    """The right half shows each tile's colour at its place, from the axes of all slides (an oracle of its own)."""
    draw_overlays(cohort / "features", tmp_path / "out")
    found = {name: read_embeddings(cohort / f"features/{name}.h5") for name in ("one", "two.é")}
    x = np.concatenate([f.features[f.good] for f in found.values()]).astype(np.float64)
    _, _, axes = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    axes = axes[:3] * np.sign(axes[np.arange(3), np.abs(axes[:3]).argmax(axis=1)])[:, None]
    low, high = np.percentile((x - x.mean(axis=0)) @ axes.T, [2, 98], axis=0)
    one = found["one"]
    expected = np.clip(255 * ((one.features - x.mean(axis=0)) @ axes.T - low) / (high - low), 0, 255)
    sheet = picture(tmp_path / "out/one.jpg")
    zoom = -(-700 // 520)  # the picture has 520 px and is enlarged twice
    left, top = 28 + 520 * zoom + 28, 28 + 36 + 30 + 34
    centres = (one.coords + 32) * zoom
    shown = np.array([sheet[top + y - 8 : top + y + 8, left + x - 8 : left + x + 8].mean((0, 1)) for x, y in centres])
    assert np.abs(shown - expected).max() < 6  # JPEG


def test_a_single_file_has_colours_of_its_own(cohort: Path, tmp_path: Path) -> None:
    draw_overlays(cohort / "features", tmp_path / "both")
    summary = draw_overlays(cohort / "features/one.h5", tmp_path / "out")
    assert summary["slide_id"].to_list() == ["one"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.jpg", "summary.csv"]
    assert np.abs(picture(tmp_path / "out/one.jpg") - picture(tmp_path / "both/one.jpg")).max() > 30


def test_drawing_again_repeats_or_skips(cohort: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(cohort / "features", features)
    draw_overlays(features, tmp_path / "out")
    first = (tmp_path / "out/one.jpg").read_bytes()
    (tmp_path / "out/two.é.jpg").unlink()
    again = draw_overlays(features, tmp_path / "out")
    assert again["status"].to_list() == ["skipped", "ok"]
    draw_overlays(features, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/one.jpg").read_bytes() == first
    with Image.open(tmp_path / "out/one.jpg") as image:
        assert json.loads(image.info["comment"])["settings"]["slide_id"] == "one"
    (features / "two.é.h5").unlink()  # fewer slides: other colours
    with pytest.raises(StoreError, match="cohort"):
        draw_overlays(features, tmp_path / "out")
    (tmp_path / "out/one.jpg").write_bytes(b"a holiday picture")
    with pytest.raises(StoreError, match="no picture of `pathokd overlay`"):
        draw_overlays(features, tmp_path / "out")


def test_slides_that_moved(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, archive = tmp_path / "features", tmp_path / "archive/deep"
    shutil.copytree(cohort / "features", features)
    rows = pd.read_csv(features / "summary.csv")
    rows["path"] = [f"/gone/{Path(path).name}" for path in rows["path"]]
    rows.to_csv(features / "summary.csv", index=False)
    args = ["overlay", str(features), "--out", str(tmp_path / "out")]
    assert main(args) == 1
    assert "2 of 2 slides failed" in capsys.readouterr().out
    messages = pd.read_csv(tmp_path / "out/summary.csv")["message"]
    assert messages.str.contains("/gone/.* is not there: give the folder it lies in now, --slides FOLDER").all()
    archive.mkdir(parents=True)
    shutil.copy(cohort / "slides/one.tif", archive)
    shutil.copy(cohort / "slides/one.tif", archive / "two.é.tif")
    crop = render(make_scene(1, 200.0, margin_um=20.0, region_um=60.0), "HE", "S50")
    write_pyramid(archive / "two.é.tif", crop, 0.5)  # a slide of that name that is another
    assert main([*args, "--slides", str(tmp_path / "archive")]) == 1
    rows = pd.read_csv(tmp_path / "out/summary.csv").set_index("slide_id")
    assert rows.loc["one", "status"] == "ok"
    assert rows.loc["one", "path"] == str(archive / "one.tif")
    assert "it is another slide" in rows.loc["two.é", "message"]
    assert main([*args, "--slides", str(tmp_path / "archive"), "--skip-errors"]) == 0
    shutil.copy(cohort / "slides/one.tif", tmp_path / "archive")
    (tmp_path / "out/one.jpg").unlink()
    assert main([*args, "--slides", str(tmp_path / "archive")]) == 1
    assert "is there 2 times" in pd.read_csv(tmp_path / "out/summary.csv")["message"].to_list()[0]
    with pytest.raises(ManifestError, match="is no folder"):
        draw_overlays(features, tmp_path / "out", slides=tmp_path / "nowhere")


def test_damaged_and_foreign_embeddings_are_rows(cohort: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(cohort / "features", features)
    whole = read_embeddings(features / "one.h5")
    settings = {**whole.header["settings"], "encoder": "other"}
    write_embeddings(
        features / "foreign.h5",
        whole.features,
        whole.coords,
        flag=whole.flag,
        tissue_fraction=whole.tissue_fraction,
        header={**whole.header, "settings": settings},
        coords_attrs=whole.coords_attrs,
        features_attrs=whole.features_attrs,
    )
    path = features / "two.é.h5"
    path.write_bytes(path.read_bytes()[:1000])
    rows = draw_overlays(features, tmp_path / "out").set_index("slide_id")
    assert rows["status"].to_dict() == {"one": "ok", "two.é": "failed", "foreign": "failed"}
    assert "truncated" in rows.loc["two.é", "message"]
    assert "encoder is 'other'" in rows.loc["foreign", "message"]
    with pytest.raises(StoreError, match="holds no embeddings"):
        draw_overlays(tmp_path, tmp_path / "out2")


@pytest.mark.parametrize(
    ("width_um", "length"), [(1107, 200), (1300, 200), (3000, 1000), (23000, 5000), (4.5, 1), (59.9, 10), (60, 20)]
)
def test_scale_bars_are_round(width_um: float, length: float) -> None:
    assert bar_um(width_um) == pytest.approx(length)
    assert width_um / 7.6 < bar_um(width_um) <= width_um / 3 * (1 + 1e-9)


def test_the_scale_bar_is_as_long_as_it_says() -> None:
    panels = [Panel(np.full((800, 1000, 3), 255, np.uint8), "", "") for _ in range(2)]
    sheet = slide_sheet("", "", panels, mpp=2.5)  # 2.5 mm wide: a bar of 0.5 mm is 200 px
    row = sheet[28 + 36 + 30 + 34 + 800 + 14 + 8].astype(int).sum(axis=1)
    dark = np.flatnonzero(row[: 28 + 1000] < 300)
    bar = dark[: np.flatnonzero(np.diff(dark, append=9999) > 1)[0] + 1]  # up to the words beside it
    assert abs(len(bar) - 201) <= 3


@pytest.mark.parametrize("shape", [(90, 30), (20, 900), (1200, 1200)])
def test_words_fit_on_every_sheet(shape: tuple[int, int]) -> None:
    """Small, narrow and wide slides, a long name and a long caption: nothing is cut off or outside."""
    white = np.full((*shape, 3), 255, np.uint8)
    panel = Panel(white, "Features", "like colours, like features " * 12, [((0, 150, 60), "tissue " * 3)] * 4)
    sheet = slide_sheet("name" * 60, "facts", [panel, panel], 1.0)
    assert sheet.dtype == np.uint8
    border = np.concatenate([sheet[:20].ravel(), sheet[-20:].ravel(), sheet[:, :20].ravel(), sheet[:, -8:].ravel()])
    assert (border == 255).all()


def test_a_real_slide_from_embed_to_clam_and_picture(tiny_teacher: Path, real_data: Path, tmp_path: Path) -> None:
    """The words a user types, on CMU-1-Small-Region (Aperio)."""
    slide, features = real_data / "wsi_small/CMU-1-Small-Region.svs", tmp_path / "features"
    assert main(["embed", str(tiny_teacher), str(slide), "--out", str(features)]) == 0
    assert main(["export", str(features), "--layout", "clam", "--out", str(tmp_path / "clam")]) == 0
    assert main(["overlay", str(features), "--out", str(tmp_path / "sheets")]) == 0
    bag = torch.load(tmp_path / "clam/pt_files/CMU-1-Small-Region.pt", weights_only=True)
    assert bag.shape == (len(read_embeddings(features / "CMU-1-Small-Region.h5").flag), 24)
    sheet = picture(tmp_path / "sheets/CMU-1-Small-Region.jpg")
    assert sheet.shape[0] > 1200  # 2,967 px of slide at its 1,200, and words
    blue = (np.abs(sheet[128:1300, :926] - np.array([20, 60, 200])).max(axis=2) < 70).sum()
    assert blue > 2000  # outlines of tiles


def test_gaps_between_tiles_stay_unpainted() -> None:
    """A stride beyond the side is an overlap below 0: the slide between tiles was not looked at."""
    overview = Overview(np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool), 1.0)
    attrs = {"patch_size": 10, "mpp_target": 0.5, "mpp_level0": 0.5, "overlap": -10}
    shown = paint_tiles(
        overview, np.array([[20, 10]]), attrs, np.array([[255, 0, 0]], np.uint8), np.ones(1, dtype=bool)
    )
    red = (shown == (255, 0, 0)).all(axis=2)
    assert red.sum() == 100
    assert red[10:20, 20:30].all()
