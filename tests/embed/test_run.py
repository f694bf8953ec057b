"""Slides in, HDF5 out: alignment, resume, damaged tiles and slides, and packed tiles."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import ImageCms

from pathokd.embed import Embedder, embed_packed, embed_slides, read_embeddings
from pathokd.errors import ManifestError, StoreError
from pathokd.models import Encoder
from pathokd.slides.manifest import TileManifest, TileSpec
from pathokd.slides.slide import Slide
from pathokd.slides.sources import find_slides
from pathokd.slides.tile import tile_slides

MakeSlide = Callable[..., Path]
MakeManifest = Callable[[list[Path]], TileManifest]


def test_rows_are_the_manifest_rows(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    paths = [make_slide("a", seed=1), make_slide("b", seed=2)]
    manifest = make_manifest(paths)
    summary = embed_slides(encoder, manifest, tmp_path / "out", readout="cls+mean", batch_size=5)
    assert summary["status"].tolist() == ["ok", "ok"]
    assert summary["n_tiles"].tolist() == [16, 16]
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["slide_id"].tolist() == ["a", "b"]

    stored = read_embeddings(tmp_path / "out" / "b.h5")
    with Slide(paths[1]) as slide:
        tiles = [slide.read_tile(x, y, mpp=0.5, tile_px=56) for x, y in stored.coords.tolist()]
    np.testing.assert_allclose(stored.features, Embedder(encoder, "cls+mean")(tiles), atol=1e-5)
    want = manifest.frame.query("slide_id == 'b'")
    assert stored.coords.tolist() == want[["x", "y"]].to_numpy().tolist()
    assert stored.good.all()
    assert stored.tissue_fraction.tolist() == [0.75] * 16


def test_attributes_say_where_and_how(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    embed_slides(encoder, make_manifest([make_slide("a", seed=1)]), tmp_path / "out", dtype="fp16")
    stored = read_embeddings(tmp_path / "out" / "a.h5")
    assert stored.features.dtype == np.float16
    assert stored.coords_attrs == {
        "name": "a",
        "patch_size": 56,
        "patch_size_level0": 56,
        "patch_level": 0,
        "overlap": 0,
        "level0_magnification": 20.0,
        "target_magnification": 20.0,
        "level0_width": 224,
        "level0_height": 224,
        "mpp_level0": 0.5,
        "mpp_target": 0.5,
        "mpp_source": "openslide",
    }
    facts = stored.features_attrs
    assert facts["encoder"] == "student"
    assert facts["weights_sha256"] == encoder.weights_sha256
    assert (facts["readout"], facts["precision"], facts["colour"]) == ("cls", "fp32", "as stored")


def test_colours_are_called_converted_only_where_a_profile_converts_them(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    bare, path = make_slide("bare", seed=1), make_slide("profile", seed=2)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tifffile.imwrite(path, tifffile.imread(path), tile=(64, 64), photometric="rgb", iccprofile=profile)
    manifest = make_manifest([bare, path])
    managed = TileManifest(manifest.frame, replace(manifest.spec, icc=True))
    embed_slides(encoder, managed, tmp_path / "out")
    found = {
        name: read_embeddings(tmp_path / f"out/{name}.h5").features_attrs["colour"] for name in ("bare", "profile")
    }
    assert found == {"bare": "as stored", "profile": "icc-to-srgb"}


def test_a_finished_slide_is_skipped_and_a_truncated_one_redone(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest, out = make_manifest([make_slide("a", seed=1), make_slide("b", seed=2)]), tmp_path / "out"
    embed_slides(encoder, manifest, out)
    before = (out / "b.h5").read_bytes()
    (out / "b.h5").write_bytes(before[:-100])
    assert embed_slides(encoder, manifest, out, workers=1)["status"].tolist() == ["skipped", "ok"]
    assert read_embeddings(out / "b.h5").good.all()
    assert embed_slides(encoder, manifest, out, overwrite=True)["status"].tolist() == ["ok", "ok"]


def test_a_slide_that_fails_leaves_no_features_of_an_earlier_model(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    """Overwritten with another model, a slide that cannot be read any more kept the old model's file among the new."""
    spoilt = make_slide("b", seed=2)
    manifest, out = make_manifest([make_slide("a", seed=1), spoilt]), tmp_path / "out"
    embed_slides(encoder, manifest, out)
    spoilt.write_bytes(spoilt.read_bytes()[:200])
    found = embed_slides(encoder, manifest, out, readout="mean", overwrite=True)
    assert found["status"].tolist() == ["ok", "failed"]
    assert [path.name for path in out.glob("*.h5")] == ["a.h5"]


def test_a_slide_that_is_not_the_one_that_was_tiled_fails(
    encoder: Encoder, make_slide: MakeSlide, tmp_path: Path
) -> None:
    """Scanned anew at 0.25 um/px under its name, it was read as if it still had 0.5: tiles of half the side."""
    path, spec = make_slide("a", seed=1), TileSpec(0.5, 56, min_tissue=0.0)
    tile_slides(find_slides(path), spec, tmp_path / "tiles")
    assert embed_slides(encoder, tmp_path / "tiles", tmp_path / "out")["status"].tolist() == ["ok"]
    pixels = tifffile.imread(path).repeat(2, 0).repeat(2, 1)
    finer = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", **finer)
    found = embed_slides(encoder, tmp_path / "tiles", tmp_path / "new")
    assert found["status"].tolist() == ["failed"]
    assert "is not the slide that was tiled under this name: tile it again" in found["message"][0]
    assert not list((tmp_path / "new").glob("*.h5"))


def test_other_settings_or_weights_are_refused_before_any_work(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest, out = make_manifest([make_slide("a", seed=1)]), tmp_path / "out"
    embed_slides(encoder, manifest, out)
    before = (out / "a.h5").read_bytes()
    with pytest.raises(StoreError, match=r"a\.h5 was made with readout = 'cls', this run asks for 'mean'"):
        embed_slides(encoder, manifest, out, readout="mean")
    with torch.no_grad():
        encoder.model.norm.bias.add_(1.0)
    try:
        with pytest.raises(StoreError, match="weights_sha256"):
            embed_slides(encoder, manifest, out)
    finally:
        with torch.no_grad():
            encoder.model.norm.bias.sub_(1.0)
    assert (out / "a.h5").read_bytes() == before


def test_a_damaged_tile_is_a_flagged_row(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide("bad", seed=1, corrupt=True), make_slide("good", seed=2)])
    summary = embed_slides(encoder, manifest, tmp_path / "out")
    assert summary["status"].tolist() == ["ok", "ok"]
    assert summary["n_unreadable"].tolist() == [4, 0]
    assert summary["message"][0] == "4 of 16 tiles are flagged and have no features."
    again = embed_slides(encoder, manifest, tmp_path / "out")
    assert again["status"].tolist() == ["skipped", "skipped"]
    assert again["n_unreadable"].tolist() == [4, 0]
    assert again["message"][0].startswith("4 of 16 tiles could not be read; if the slide was mended since, --overwrite")
    assert not again["message"][1]
    stored = read_embeddings(tmp_path / "out" / "bad.h5")
    # The spoilt storage tile is 64 px wide, so the four 56 px tiles that touch it are unreadable.
    assert np.flatnonzero(stored.flag == "unreadable").tolist() == [0, 1, 4, 5]
    assert np.isnan(stored.features[~stored.good]).all()
    assert np.isfinite(stored.features[stored.good]).all()


def test_rows_flagged_in_the_manifest_are_not_embedded(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide("a", seed=1)])
    manifest.frame.loc[3, "flag"] = "pen"
    embed_slides(encoder, manifest, tmp_path / "out")
    assert embed_slides(encoder, manifest, tmp_path / "out")["message"].tolist() == [""]  # nothing to try again
    stored = read_embeddings(tmp_path / "out" / "a.h5")
    assert stored.flag[3] == "pen"
    assert np.isnan(stored.features[3]).all()


def test_a_broken_slide_is_a_failed_row_and_the_others_are_done(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    paths = [make_slide("a", seed=1), make_slide("gone", seed=2), make_slide("c", seed=3)]
    manifest = make_manifest(paths)
    paths[1].unlink()
    summary = embed_slides(encoder, manifest, tmp_path / "out").set_index("slide_id")
    assert summary["status"].to_dict() == {"a": "ok", "gone": "failed", "c": "ok"}
    assert "gone.tiff" in summary["message"]["gone"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.h5", "c.h5", "summary.csv"]


def test_the_mpp_of_a_slide_list_is_taken(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide("a", seed=1, mpp=None)])
    assert embed_slides(encoder, manifest, tmp_path / "out")["status"].tolist() == ["ok"]
    assert read_embeddings(tmp_path / "out" / "a.h5").coords_attrs["mpp_source"] == "given"


def test_another_slide_of_the_same_name_is_not_taken_for_done(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    one, out = make_slide("a", seed=1), tmp_path / "out"
    embed_slides(encoder, make_manifest([one]), out)
    before = (out / "a.h5").read_bytes()
    (tmp_path / "other").mkdir()
    other = one.rename(tmp_path / "other" / "a.tiff")
    assert embed_slides(encoder, make_manifest([other]), out)["status"].tolist() == ["skipped"]  # moved
    manifest = make_manifest([make_slide("a", seed=2)])
    with pytest.raises(StoreError, match=r"a\.h5 holds features of .*a\.tiff .* of the same name and another content"):
        embed_slides(encoder, manifest, out)
    assert (out / "a.h5").read_bytes() == before
    assert embed_slides(encoder, manifest, out, overwrite=True)["status"].tolist() == ["ok"]
    (tmp_path / "a.tiff").unlink()  # archived: what is done stays done
    assert embed_slides(encoder, manifest, out)["status"].tolist() == ["skipped"]


def test_a_manifest_that_contradicts_itself_is_refused(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide("a", seed=1)])
    half = np.arange(len(manifest.frame)) < 8
    for column, value, message in (
        ("path", str(make_slide("b", seed=2)), "slide 'a' have two values of path"),
        ("mpp_level0", 0.25, "slide 'a' have two values of mpp_level0, 0.5 and 0.25"),
        ("mpp", 1.0, "says mpp = 0.5 and holds tiles of 1"),
        ("tile_px", 28, "says tile_px = 56 and holds tiles of 28"),
    ):
        frame = manifest.frame.assign(**{column: manifest.frame[column].where(half, value)})
        with pytest.raises(ManifestError, match=message):
            embed_slides(encoder, TileManifest(frame, manifest.spec), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_manifest_may_be_a_folder(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    make_manifest([make_slide("a", seed=1)]).write(tmp_path / "tiles" / "manifest.parquet")
    assert len(embed_slides(encoder, tmp_path / "tiles", tmp_path / "out")) == 1
    empty = make_manifest([tmp_path / "a.tiff"])
    with pytest.raises(ManifestError, match="no tiles"):
        embed_slides(encoder, TileManifest(empty.frame.iloc[:0], empty.spec), tmp_path / "out")


def test_packed_tiles(encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path) -> None:
    from pathokd.data.pack import pack_tiles
    from pathokd.data.packed import PackedTiles

    make_manifest([make_slide("a", seed=1)]).write(tmp_path / "tiles" / "manifest.parquet")
    pack_tiles(tmp_path / "tiles", tmp_path / "packed")
    packed = PackedTiles(tmp_path / "packed")
    everything = embed_packed(Embedder(encoder, batch_size=5), packed)
    assert everything.features.shape == (16, 48)
    np.testing.assert_allclose(everything.features[[7]], Embedder(encoder)(packed.read(7)[None]), atol=1e-5)
    some = embed_packed(Embedder(encoder), tmp_path / "packed", rows=np.array([9, 2]))
    np.testing.assert_allclose(some.features, everything.features[[9, 2]], atol=1e-5)
    assert some.tiles["key"].tolist() == packed.index["key"].iloc[[9, 2]].tolist()
