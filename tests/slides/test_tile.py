import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from pathokd.cli.main import main
from pathokd.errors import ManifestError, StoreError
from pathokd.files import file_mark
from pathokd.slides import SlideSource, TileManifest, TileSpec, find_slides, tile_slides

WriteSlide = Callable[..., Path]
BreakTile = Callable[[Path, int, int], None]
Picture = npt.NDArray[np.uint8]
SPEC = TileSpec(mpp=1.0, tile_px=64, min_tissue=0.5)


def test_values(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    path = write_slide(tissue_like)
    summary = tile_slides(find_slides(path), SPEC, tmp_path / "out")
    (row,) = summary.to_dict("records")
    assert (row["slide_id"], row["status"], row["mpp_level0"], row["mpp_source"]) == (
        "slide",
        "ok",
        0.5,
        "openslide",
    )
    manifest = TileManifest.read(tmp_path / "out/manifest.parquet")
    frame = manifest.frame
    assert manifest.spec == SPEC
    assert row["n_tiles"] == len(frame) > 10
    assert list(frame.columns) == [
        "slide_id", "path", "x", "y", "mpp", "mpp_level0", "tile_px", "tissue_fraction", "flag",
    ]  # fmt: skip
    assert [str(t) for t in frame.dtypes[2:8]] == ["int64", "int64", "float64", "float64", "int32", "float32"]
    assert (frame["x"] % 128 == 0).all()
    assert (frame["tissue_fraction"] >= 0.5).all()
    # The disc: centre (500, 500), radius 350. Fractions against a count of level-0 pixels.
    disc = (tissue_like[..., 1] == 130).astype(float)
    truth = [disc[y : y + 128, x : x + 128].mean() for x, y in zip(frame["x"], frame["y"], strict=True)]
    assert np.abs(frame["tissue_fraction"] - truth).max() < 0.16
    area = frame["tissue_fraction"].sum() * 128**2
    assert area == pytest.approx(np.pi * 350**2, rel=0.12)
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == {
        "manifest.parquet", "summary.csv", "tiles/slide.parquet",
        "geojson/slide.geojson", "overlays/slide.jpg",
    }  # fmt: skip
    assert len(json.loads((tmp_path / "out/geojson/slide.geojson").read_text())["features"]) == 1
    with Image.open(tmp_path / "out/overlays/slide.jpg") as overlay:
        assert max(overlay.size) == 1200


def test_a_bad_slide_is_a_row(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tissue_like, name="in/good.tif")
    write_slide(tissue_like, name="in/nompp.tif", mpp=None)
    write_slide(np.full((800, 800, 3), 4, np.uint8), name="in/dark.tif")
    write_slide(np.full((800, 800, 3), 243, np.uint8), name="in/glass.tif")
    write_slide(tissue_like, name="in/coarse.tif", mpp=2.0)
    (tmp_path / "in/broken.svs").write_bytes(b"broken")
    sources = find_slides(tmp_path / "in")
    summary = tile_slides([*sources, SlideSource("gone", tmp_path / "gone.svs")], SPEC, tmp_path / "out")
    told = summary.set_index("slide_id")
    assert told["status"].to_dict() == {
        "broken": "failed", "coarse": "failed", "dark": "failed", "glass": "ok", "gone": "failed",
        "good": "ok", "nompp": "failed",
    }  # fmt: skip
    for slide, words in {
        "broken": "of no format", "coarse": "2 um/px at best", "dark": "brightfield",
        "glass": "No tissue was found", "gone": "does not exist", "good": "", "nompp": "--mpp-level0",
    }.items():  # fmt: skip
        assert words in told.loc[slide, "message"]
    assert set(TileManifest.read(tmp_path / "out/manifest.parquet").frame["slide_id"]) == {"good"}
    assert pd.read_csv(tmp_path / "out/summary.csv")["status"].tolist() == summary["status"].tolist()


def test_slides_without_tiles_are_told(
    write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder of blank slides nothing was said, and its empty manifest was a success."""
    (tmp_path / "in").mkdir()
    write_slide(np.full((800, 800, 3), 243, np.uint8), name="in/glass.tif")
    command = ["tile", str(tmp_path / "in"), "--tile-px", "64", "--mpp", "1", "--out"]
    assert main([*command, str(tmp_path / "blank")]) == 1
    assert "1 of 1 slides gave no tile" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "blank"), "--skip-errors"]) == 1
    assert main(["pack", str(tmp_path / "blank"), "--out", str(tmp_path / "packed")]) == 1
    assert "holds no good tiles: lower --min-tissue or look at its summary.csv" in capsys.readouterr().err
    write_slide(tissue_like, name="in/good.tif")
    assert main([*command, str(tmp_path / "both")]) == 0
    assert "1 of 2 slides gave no tile" in capsys.readouterr().out


def test_a_path_the_disk_cannot_hold_is_a_row(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    good = SlideSource("good", write_slide(tissue_like, name="good.tif"))
    summary = tile_slides([SlideSource("long", tmp_path / ("x" * 300 + ".svs")), good], SPEC, tmp_path / "out")
    told = summary.set_index("slide_id")
    assert told["status"].to_dict() == {"long": "failed", "good": "ok"}
    assert "cannot be reached (File name too long)" in told.loc["long", "message"]


def test_resume(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_slide(tissue_like, name=f"in/{name}.tif")
    out, sources = tmp_path / "out", find_slides(tmp_path / "in")
    first = tile_slides(sources, SPEC, out)
    whole = TileManifest.read(out / "manifest.parquet").frame
    # b: truncated as by a full disk; c: never finished.
    tiles = (out / "tiles/b.parquet").read_bytes()
    (out / "tiles/b.parquet").write_bytes(tiles[:-20])
    (out / "tiles/c.parquet").unlink()
    second = tile_slides(sources, SPEC, out)
    assert second["status"].tolist() == ["skipped", "ok", "ok"]
    for column in ("n_tiles", "mpp_level0", "mpp_source", "message"):
        assert second[column].tolist() == first[column].tolist()
    pd.testing.assert_frame_equal(TileManifest.read(out / "manifest.parquet").frame, whole)
    with pytest.raises(StoreError, match=r"min_tissue = 0\.5, this run asks for 0\.1"):
        tile_slides(sources, TileSpec(mpp=1.0, tile_px=64, min_tissue=0.1), out)
    again = tile_slides(sources, TileSpec(mpp=1.0, tile_px=64, min_tissue=0.1), out, overwrite=True)
    assert again["status"].tolist() == ["ok"] * 3


def test_another_slide_of_the_same_name_and_size(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    """A resumed run kept the tiles of the file that lay there before, and said they were of the new one."""
    first, out = write_slide(tissue_like), tmp_path / "out"
    tile_slides(find_slides(first), SPEC, out)
    told = TileManifest.read(out / "manifest.parquet").facts["slides"]
    assert told == {"slide": file_mark(first)}
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    with pytest.raises(StoreError, match=r"slide\.tif is not the file that .*slide\.parquet was made of"):
        tile_slides(find_slides(first), SPEC, out)
    assert TileManifest.read(out / "manifest.parquet").facts["slides"] == told
    assert tile_slides(find_slides(first), SPEC, out, overwrite=True)["status"].tolist() == ["ok"]
    assert TileManifest.read(out / "manifest.parquet").facts["slides"] == {"slide": file_mark(first)} != told


def test_slides_of_earlier_runs_do_not_leave_the_manifest_in_silence(
    write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two runs into one folder the last one's slides alone were in the manifest, and nothing said so."""
    for name in "ab":
        write_slide(tissue_like, name=f"{name}.tif")
    both, out = find_slides(tmp_path), tmp_path / "out"
    for source in both:
        tile_slides([source], SPEC, out)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 tiled there before are not in it (a is one): name all slides in one run" in said
    tile_slides(both, SPEC, out)
    assert "not in it" not in " ".join(capsys.readouterr().err.split())
    assert TileManifest.read(out / "manifest.parquet").frame["slide_id"].unique().tolist() == ["a", "b"]


def test_mpp_level0_is_for_slides_that_do_not_say(
    write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path
) -> None:
    """It also took the place of what the others said, so that their tiles had another scale without a word."""
    (tmp_path / "in").mkdir()
    write_slide(tissue_like, name="in/mute.tif", mpp=None)
    write_slide(tissue_like, name="in/says.tif", mpp=0.25)
    out = tmp_path / "out"
    assert tile_slides(find_slides(tmp_path / "in"), SPEC, out)["status"].tolist() == ["failed", "ok"]
    # The sentence of the failed slide asks for --mpp-level0; that leaves the other as it is, and done.
    told = tile_slides(find_slides(tmp_path / "in", mpp=0.5), SPEC, out)
    assert told["status"].tolist() == ["ok", "skipped"]
    assert told["mpp_level0"].tolist() == [0.5, 0.25]
    assert told["mpp_source"].tolist() == ["given", "openslide"]
    assert tile_slides(find_slides(tmp_path / "in", mpp=0.5), SPEC, out)["status"].tolist() == ["skipped", "skipped"]
    with pytest.raises(StoreError, match=r"mute.* made with mpp_given = 0\.5, this run asks for 0\.4"):
        tile_slides(find_slides(tmp_path / "in", mpp=0.4), SPEC, out)
    anew = tile_slides(find_slides(tmp_path / "in", mpp=0.5), SPEC, tmp_path / "anew")
    assert "says 0.25 um/px (openslide.mpp-x): the 0.5 um/px for slides that do not say" in anew["message"][1]


def test_metadata_and_labels(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    write_slide(tissue_like, name="a.tif")
    write_slide(tissue_like, name="b.tif")
    classes = np.zeros((125, 150), np.uint8)
    classes[:, 62:] = 1
    Image.fromarray(classes).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"mpp": 4.0, "classes": ["stroma", "tumour"]}))
    (tmp_path / "slides.csv").write_text("path,stain,label_map\na.tif,HE,a.png\nb.tif,,\n")
    tile_slides(find_slides(tmp_path / "slides.csv"), SPEC, tmp_path / "out")
    frame = TileManifest.read(tmp_path / "out/manifest.parquet").frame
    assert list(frame.columns[9:]) == ["stain", "label", "label_share"]
    a, b = frame[frame["slide_id"] == "a"], frame[frame["slide_id"] == "b"]
    assert set(a["stain"]) == {"HE"}
    assert set(b["stain"]) == {""}
    # The seam lies at 62 map px = 496 level-0 px, in the tile that starts at 384: 112 of 128 px are stroma.
    assert set(a.loc[a["x"] <= 384, "label"]) == {"stroma"}
    assert set(a.loc[a["x"] > 384, "label"]) == {"tumour"}
    assert a.loc[a["x"] == 384, "label_share"].to_numpy() == pytest.approx(112 / 128)
    assert set(b["label"]) == {""}
    assert b["label_share"].isna().all()

    sources = find_slides(tmp_path / "slides.csv")
    assert tile_slides(sources, SPEC, tmp_path / "out")["status"].tolist() == ["skipped", "skipped"]
    mask = np.asarray(Image.open(tmp_path / "a.png"))
    Image.fromarray(np.flip(mask, 1)).save(tmp_path / "a.png")
    with pytest.raises(StoreError, match="made with label_map_sha256 = "):  # the map was corrected since
        tile_slides(sources, SPEC, tmp_path / "out")


def test_damage_in_the_overview_drops_nothing(
    write_slide: WriteSlide, tissue_like: Picture, break_tile: BreakTile, tmp_path: Path
) -> None:
    path = write_slide(tissue_like, compression="jpeg")
    whole = tile_slides(find_slides(path), SPEC, tmp_path / "whole")
    break_tile(path, 0, 6)
    summary = tile_slides(find_slides(path), SPEC, tmp_path / "damaged")
    assert summary["status"].tolist() == ["ok"]
    assert "cannot be read; tiles there are kept untested" in summary["message"][0]
    assert summary["n_tiles"][0] >= whole["n_tiles"][0]


def test_output_that_is_a_file(write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path) -> None:
    blocked = tmp_path / "out"
    blocked.write_text("precious")
    with pytest.raises(StoreError, match="is a file"):
        tile_slides(find_slides(write_slide(tissue_like)), SPEC, blocked)
    assert blocked.read_text() == "precious"


def test_a_slide_that_turns_bad_leaves_nothing_behind(
    write_slide: WriteSlide, tissue_like: Picture, tmp_path: Path
) -> None:
    path = write_slide(tissue_like)
    tile_slides(find_slides(path), SPEC, tmp_path / "out")
    path.write_bytes(b"gone bad")
    summary = tile_slides(find_slides(path), SPEC, tmp_path / "out", overwrite=True)
    assert summary["status"].tolist() == ["failed"]
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {"manifest.parquet", "summary.csv"}
    assert len(TileManifest.read(tmp_path / "out/manifest.parquet").frame) == 0


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No slides"):
        tile_slides([], SPEC, tmp_path)
    for bad in (
        {"mpp": 0.0},
        {"mpp": 0.0005},
        {"tile_px": 0},
        {"stride_px": 0},
        {"min_tissue": 1.5},
        {"border": "any"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TileSpec(**bad)  # type: ignore[arg-type]


def test_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        TileManifest.read(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ManifestError, match="no readable Parquet"):
        TileManifest.read(tmp_path / "bad.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match="no pathokd header"):
        TileManifest.read(tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match="lacks the columns"):
        TileManifest(pd.DataFrame({"x": [1]}), SPEC).write(tmp_path / "m.parquet")
