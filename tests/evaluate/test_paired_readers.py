"""Every layout that pairs and features come in, aligned by name whatever the order; every bad input, one sentence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from pathokd.data.packed import PackedTiles
from pathokd.embed import Embedder, embed_packed, write_embeddings
from pathokd.errors import ManifestError, StoreError
from pathokd.evaluate import paired_features
from pathokd.evaluate.paired_features import holds_features, model_features, stored_features
from pathokd.evaluate.paired_readers import _tiles, open_pairs
from pathokd.evaluate.paired_set import PairedSet, prepare
from pathokd.evaluate.robustness import read_index
from pathokd.files import make_header
from pathokd.models import Encoder
from pathokd.slides.manifest import TileManifest
from pathokd.types import Rgb

SLIDES = ("GMH_S60_to_GMH_S60.tif", "GMH_AT2_to_GMH_S60.tif", "HR_S60_to_GMH_S60.tif")
COORDS = [(448, 0), (0, 224), (0, 0), (224, 224)]
"""Not in the order of (x, y)."""


def tile(slide: str, x: int, y: int) -> Rgb:
    return np.full((8, 8, 3), (SLIDES.index(slide) * 60 + x // 224 * 10 + y // 224) % 256, np.uint8)


def png_bytes(rgb: Rgb) -> bytes:
    return bytes(cv2.imencode(".png", rgb[..., ::-1])[1])


def check_plism(tiles: PairedSet) -> None:
    """Conditions by the file name, places sorted by (x, y), pictures of the right place."""
    assert {name: tuple(c) for name, c in tiles.conditions.items()} == {
        "GMH_S60": ("GMH", "S60"),
        "GMH_AT2": ("GMH", "AT2"),
        "HR_S60": ("HR", "S60"),
    }
    assert tiles.places.tolist() == ["0_0", "0_224", "224_224", "448_0"]
    assert tiles.read is not None
    for rows in tiles.rows.values():
        for place, row in zip(tiles.places, rows, strict=True):
            x, y = map(int, place.split("_"))
            assert np.array_equal(tiles.read(int(row)), tile(tiles.frame["slide_id"].iloc[row], x, y))


@pytest.fixture
def plism(tmp_path: Path) -> Path:
    folder = tmp_path / "plism"
    folder.mkdir()
    for number, slide in enumerate(SLIDES):
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            for x, y in np.roll(COORDS, number, axis=0):
                file[f"tile_0_{x}_{y}"] = tile(slide, x, y)
    return folder


def test_plism_h5(plism: Path) -> None:
    check_plism(open_pairs(plism))


@pytest.mark.parametrize("struct", [True, False])
def test_plism_tile_parquet(tmp_path: Path, struct: bool) -> None:
    rows = [(slide, f"tile_0_{x}_{y}", png_bytes(tile(slide, x, y))) for slide in SLIDES for x, y in COORDS]
    order = np.random.default_rng(0).permutation(len(rows))
    png = [{"bytes": rows[i][2], "path": None} if struct else rows[i][2] for i in order]
    table = pa.table({"slide_id": [rows[i][0] for i in order], "tile_id": [rows[i][1] for i in order], "png": png})
    pq.write_table(table.slice(0, 7), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(7), tmp_path / "b.parquet", row_group_size=3)
    check_plism(open_pairs(tmp_path))


def test_plism_features_are_aligned_by_coordinates(plism: Path, tmp_path: Path) -> None:
    tiles = open_pairs(plism)
    rng = np.random.default_rng(0)
    made = {(slide, x, y): rng.standard_normal(5).astype(np.float32) for slide in SLIDES for x, y in COORDS}
    for number, slide in enumerate(SLIDES):
        # The published tools keep .tif in the name in one mode and drop it in the other.
        folder = tmp_path / "export" / (slide if number else slide.removesuffix(".tif"))
        folder.mkdir(parents=True)
        order = np.random.default_rng(number).permutation(len(COORDS))
        rows = [[0, *COORDS[i], *made[slide, *COORDS[i]]] for i in order]
        np.save(folder / "features.npy", np.array(rows, np.float32))
    assert holds_features(tmp_path / "export")
    found = stored_features("m", tmp_path / "export", tiles)
    for rows in tiles.rows.values():
        for place, vector in zip(tiles.places, found.load(rows), strict=True):
            x, y = map(int, place.split("_"))
            slide = str(tiles.frame["slide_id"].iloc[rows[0]])
            assert np.array_equal(vector, made[slide, x, y])
    alone = open_pairs(tmp_path / "export")  # the features are enough to pair them
    assert alone.read is None
    assert alone.places.tolist() == tiles.places.tolist()
    assert alone.conditions == tiles.conditions
    np.save(tmp_path / "export" / SLIDES[2] / "features.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(ManifestError, match=r"shape \(n, 3 \+ d\): level, x, y and features, got \(4, 2\)"):
        open_pairs(tmp_path / "export")
    (tmp_path / "export" / SLIDES[1] / "features.npy").unlink()
    with pytest.raises(StoreError, match=r"m has no features of 1 of 3 slides \(GMH_AT2"):
        stored_features("m", tmp_path / "export", tiles)


def test_half_stride_slides_pair_the_same_microns(packed: PackedTiles) -> None:
    """Tiles half a tile apart were left out as overlapping, or paired with their neighbours."""
    half = packed.index.assign(x=packed.index["x"] // 2, y=packed.index["y"] // 2)
    tiles = _tiles(half, packed.read, "here")
    assert len(tiles) == len(half)
    assert len(tiles.places) == 72
    assert tiles.notes == ()
    where = tiles.frame[["x", "y"]].to_numpy() * tiles.frame[["mpp_level0"]].to_numpy()
    first, *others = (where[rows] for rows in tiles.rows.values())
    assert all(np.abs(first - other).max() < 1 for other in others)
    twice = _tiles(pd.concat([half, half], ignore_index=True), lambda row: packed.read(row % len(half)), "here")
    assert len(twice) == len(half)
    assert twice.notes[0].startswith(f"{len(half)} of {2 * len(half)} tiles show a place that")


def test_a_folder_per_scanner(tmp_path: Path) -> None:
    for scanner in ("HE_AT2", "HE_S60"):
        (tmp_path / scanner).mkdir()
        for place in ("one", "two", "three"):
            value = len(place) * 20 + len(scanner)
            (tmp_path / scanner / f"{place}.png").write_bytes(png_bytes(np.full((4, 4, 3), value, np.uint8)))
    tiles = open_pairs(tmp_path)
    assert set(tiles.conditions.values()) == {("HE", "AT2"), ("HE", "S60")}
    assert set(tiles.places) == {"one", "two", "three"}
    assert tiles.read is not None
    assert int(tiles.read(int(tiles.rows["HE_AT2"][0]))[0, 0, 0]) == len(tiles.places[0]) * 20 + 6


@pytest.mark.parametrize("folders", [("Hamamatsu_S60", "Leica_GT450"), ("Hamamatsu_S60", "GT450")])
def test_makers_that_pass_for_stainings_are_told(tmp_path: Path, folders: tuple[str, str]) -> None:
    """One staining on two scanners was reported as two stainings, without a word."""
    for folder in folders:
        (tmp_path / folder).mkdir()
        for place in ("one", "two"):
            (tmp_path / folder / f"{place}.png").write_bytes(png_bytes(np.zeros((4, 4, 3), np.uint8)))
    with pytest.warns(UserWarning, match=r"Hamamatsu_S60 is read as staining Hamamatsu on scanner S60, yet no scanner"):
        open_pairs(tmp_path)
    for folder in folders:
        (tmp_path / folder).rename(tmp_path / folder.replace("_", "-"))
    assert len({condition.stain for condition in open_pairs(tmp_path).conditions.values()}) == 1


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    """Many programs export tiles as RGBA; what was cut away became black."""
    for scanner in "AB":
        (tmp_path / scanner).mkdir()
        for place in "pq":
            rgba = np.zeros((8, 8, 4), np.uint8)
            rgba[2:6, 2:6] = (200, 100, 150, 255)
            Image.fromarray(rgba).save(tmp_path / scanner / f"{place}.png")
    read = open_pairs(tmp_path).read
    assert read is not None
    assert read(0)[0, 0].tolist() == [255, 255, 255]
    assert read(0)[3, 3].tolist() == [200, 100, 150]


def test_packed_pairs_and_a_manifest_of_slides_give_the_same_features(
    packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    tiles = open_pairs(packed.folder)
    assert len(tiles.places) == 72
    for rows in tiles.rows.values():
        assert tiles.column("pair_id", rows).tolist() == tiles.places.tolist()
    embedder = Embedder(encoders["student"], batch_size=32)
    made = model_features("m", embedder, tiles, tmp_path / "cache")
    frame = tiles.frame.sample(frac=1.0, random_state=1)
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    again = open_pairs(tmp_path / "pairs.csv")
    assert set(again.places) == set(tiles.places)
    assert again.read is not None
    assert tiles.read is not None
    row = int(np.flatnonzero(again.frame["key"] == tiles.frame["key"].iloc[5])[0])
    assert np.array_equal(again.read(row), tiles.read(5))

    whole = embed_packed(embedder, packed)
    for slide, part in whole.tiles.groupby("slide_id"):
        rows = part.sample(frac=1.0, random_state=2).index.to_numpy()
        write_embeddings(
            tmp_path / "h5" / f"{slide}.h5",
            whole.features[rows],
            whole.tiles[["x", "y"]].to_numpy()[rows],
            flag=np.full(len(rows), "", object),
            tissue_fraction=np.ones(len(rows), np.float32),
            header=make_header("embeddings/1", {}),
            coords_attrs={},
            features_attrs={},
        )
    stored = stored_features("m", tmp_path / "h5", again)
    key = pd.Series(np.arange(len(tiles)), index=tiles.frame["key"])
    every = np.arange(len(again))
    assert np.array_equal(stored.load(every), made.load(key[again.frame["key"]].to_numpy()))


def test_kept_features_are_used_again_and_only_for_the_same_model(
    packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    tiles = open_pairs(packed.folder)
    student = Embedder(encoders["student"], batch_size=32)
    first = model_features("m", student, tiles, tmp_path / "cache")
    rows = np.arange(3)
    before = first.load(rows)
    block = next((tmp_path / "cache").glob("*.npy"))
    np.save(block, np.load(block) + 1)
    second = model_features("m", student, tiles, tmp_path / "cache")
    assert np.array_equal(second.load(rows), before + 1)
    assert second.identity == first.identity
    with pytest.raises(StoreError, match=r"was made with .*pass --overwrite"):
        model_features("m", Embedder(encoders["teacher"]), tiles, tmp_path / "cache")


def test_kept_features_are_not_those_of_another_normalisation(
    packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    """A student exported again with a corrected mean has the weights of before, and got the features of before."""
    tiles, student = open_pairs(packed.folder), encoders["student"]
    first = model_features("m", Embedder(student), tiles, tmp_path / "cache")
    card = dataclasses.replace(student.card, mean=(0.1, 0.2, 0.3))
    with pytest.raises(StoreError, match=r"was made with mean = .* pass --overwrite"):
        model_features("m", Embedder(Encoder(student.model, card)), tiles, tmp_path / "cache")
    other = model_features("m", Embedder(Encoder(student.model, card)), tiles, tmp_path / "other")
    assert other.identity != first.identity


def test_overwriting_that_was_cut_off_leaves_nothing_of_the_old_model(
    packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header named the new model at once, so the next run took the blocks of the old one for its own."""
    monkeypatch.setattr(paired_features, "BLOCK", 100)
    tiles = open_pairs(packed.folder)
    teacher, student = (Embedder(encoders[name], batch_size=32) for name in ("teacher", "student"))
    model_features("m", teacher, tiles, tmp_path / "cache")
    real = paired_features._embed_block

    def cut_off(embedder: Embedder, tiles: PairedSet, cache: Path, start: int, *rest: Any) -> None:
        if start:
            raise KeyboardInterrupt
        real(embedder, tiles, cache, start, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(paired_features, "_embed_block", cut_off)
        with pytest.raises(KeyboardInterrupt):
            model_features("m", student, tiles, tmp_path / "cache", overwrite=True)
    every = np.arange(len(tiles))
    found = model_features("m", student, tiles, tmp_path / "cache").load(every)
    assert np.array_equal(found, model_features("m", student, tiles, tmp_path / "other").load(every))


def test_slides_that_are_not_registered_are_one_sentence() -> None:
    """Slides of three patients, each under a condition of its own, ended in pandas' "index out of bounds"."""
    frame = pd.DataFrame({"pair_id": ["p", "q", "r"], "stain": ["HE", "IHC", "HE"], "scanner": ["A", "A", "B"]})
    with pytest.raises(ManifestError, match=r"no place is seen under two of its conditions \(HE_A, IHC_A, HE_B\)"):
        prepare(frame, "mine", drop_unpaired=True)


@pytest.mark.parametrize("change", [{"x": 1}, {"y": 8}, {"mpp_level0": 0.01}])
def test_kept_features_are_not_those_of_other_places(change: dict[str, float]) -> None:
    """A registration that was corrected (x and y of a slide) got the features of the old places."""
    frame = pd.DataFrame({**GOOD, "x": [0, 8, 0, 8], "y": 0, "mpp": 0.5, "mpp_level0": 0.25})
    moved = frame.assign(**{name: frame[name] + by * (frame["scanner"] == "B") for name, by in change.items()})
    assert prepare(moved, "moved").fingerprint != prepare(frame, "before").fingerprint


def test_kept_features_are_not_those_of_other_pictures(
    packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    """Tiles exported or packed anew under the same names got the features of the old ones."""
    rng = np.random.default_rng(0)
    for scanner, shade in (("A", 1), ("B", 2)):
        (tmp_path / "tiles" / scanner).mkdir(parents=True)
        for place in "pq":
            picture = rng.integers(0, 99 * shade, (32, 32, 3), np.uint8)
            (tmp_path / "tiles" / scanner / f"{place}.png").write_bytes(png_bytes(picture))
    embedder = Embedder(encoders["student"])
    model_features("m", embedder, open_pairs(tmp_path / "tiles"), tmp_path / "cache")
    model_features("m", embedder, open_pairs(tmp_path / "tiles"), tmp_path / "cache")
    (tmp_path / "tiles" / "B" / "p.png").write_bytes(png_bytes(np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(StoreError, match=r"was made with tiles = .* pass --overwrite"):
        model_features("m", embedder, open_pairs(tmp_path / "tiles"), tmp_path / "cache")
    again = packed.index.assign(size=packed.index["size"] + 1)
    assert _tiles(again, packed.read, "here").fingerprint != open_pairs(packed.folder).fingerprint


def test_kept_features_are_not_those_of_pictures_of_the_same_size(tmp_path: Path) -> None:
    """Pictures that are not compressed all have one size, and were taken for those of before."""
    for scanner in "AB":
        (tmp_path / scanner).mkdir()
        for place in "pq":
            tifffile.imwrite(tmp_path / scanner / f"{place}.tif", np.full((8, 8, 3), 9, np.uint8))
    rows = [f"{place},{scanner},{scanner}/{place}.tif" for scanner in "AB" for place in "pq"]
    (tmp_path / "pairs.csv").write_text("\n".join(["pair_id,scanner,path", *rows]))
    before = [open_pairs(path).fingerprint for path in (tmp_path, tmp_path / "pairs.csv")]
    assert [open_pairs(path).fingerprint for path in (tmp_path, tmp_path / "pairs.csv")] == before
    tifffile.imwrite(tmp_path / "B" / "p.tif", np.full((8, 8, 3), 8, np.uint8))
    after = [open_pairs(path).fingerprint for path in (tmp_path, tmp_path / "pairs.csv")]
    assert not set(after) & set(before)


def test_kept_features_are_not_those_of_other_slides(
    slides: TileManifest, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    """Slides scanned anew under their names, and the same tiles in other colours, got the features of before."""
    embedder, cache, where = Embedder(encoders["student"]), tmp_path / "cache", tmp_path / "manifest.parquet"
    slides.write(where)
    model_features("m", embedder, open_pairs(tmp_path), cache)
    TileManifest(slides.frame, dataclasses.replace(slides.spec, icc=True)).write(where)
    with pytest.raises(StoreError, match=r"was made with tiles = .* pass --overwrite"):
        model_features("m", embedder, open_pairs(tmp_path), cache)
    slides.write(where)
    model_features("m", embedder, open_pairs(tmp_path), cache)
    scan = Path(slides.frame["path"].iloc[0])
    tifffile.imwrite(scan, np.zeros((512, 512, 3), np.uint8), tile=(64, 64), photometric="rgb")
    with pytest.raises(StoreError, match=r"was made with tiles = .* pass --overwrite"):
        model_features("m", embedder, open_pairs(tmp_path), cache)


def test_pathorob_columns_and_features(tmp_path: Path) -> None:
    rows = [
        {
            "subset": "ID",
            "slide_id": f"s{i % 4}",
            "patch_id": str(i),
            "biological_class": "ab"[i % 2],
            "medical_center": "XY"[i // 10],
        }
        for i in range(20)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "camelyon.csv", index=False)
    tiles = open_pairs(tmp_path / "camelyon.csv")
    assert not tiles.registered
    assert tiles.frame[["label", "site"]].iloc[0].tolist() == ["a", "X"]
    for centre in "XY":
        some = [row for row in rows if row["medical_center"] == centre]
        arrays: dict[str, Any] = {
            f"{r['slide_id']}-{r['patch_id']}": np.full(3, float(r["patch_id"]) + 1) for r in some
        }
        np.savez(tmp_path / f"{centre}.npz", **arrays)
    found = stored_features("m", tmp_path, tiles)
    assert found.load(np.array([7, 19]))[:, 0].tolist() == [8.0, 20.0]


GOOD = {"pair_id": ["p", "q", "p", "q"], "stain": ["HE"] * 4, "scanner": ["A", "A", "B", "B"]}


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"pair_id": ["p", "q", "p", "r"]}, r"2 of 4 rows are unpaired \(place q"),
        ({"pair_id": ["p", "p", "p", "q"]}, "place p occurs more than once under HE_A"),
        ({"pair_id": ["p", "", "p", ""]}, "2 rows have no pair_id"),
        ({"scanner": ["A"] * 4, "pair_id": list("pqrs")}, r"one staining and one scanner only \(HE_A\)"),
        ({"scanner": list("ABAC"), "pair_id": list("ppqq")}, "only 0 places are seen under all 3 conditions"),
        (
            {"label_share": ["0.9", "most", "", ""]},
            "should hold numbers in the column label_share, got 'most' in row 2",
        ),
    ],
)
def test_bad_manifests(columns: dict[str, list[str]], sentence: str, tmp_path: Path) -> None:
    pd.DataFrame({**GOOD, **columns}).to_csv(tmp_path / "pairs.csv", index=False)
    with pytest.raises(ManifestError, match=sentence) as caught:
        open_pairs(tmp_path / "pairs.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"x": ["1", "z", "3", "4"]}, r"whole numbers in the column x, got 'z' in row 2"),
        ({"x": ["1", "2", "3.5", "4"]}, r"whole numbers in the column x, got '3.5' in row 3"),
        ({"x": ["1", "2", "3", ""]}, r"whole numbers in the column x, got '' in row 4"),
        (
            {"x": list("1234"), "mpp": ["0.5", "q", "0.5", "0.5"]},
            r"numbers above 0 in the column mpp, got 'q' in row 2",
        ),
        ({"x": list("1234"), "mpp": ["0.5", "1.0"] * 2}, r"one mpp for all tiles, .* got 0.5, 1: name the pixel size"),
        ({"x": list("1234"), "tile_px": ["224", "112"] * 2}, r"one tile_px for all tiles, .* got 112, 224"),
    ],
)
def test_numbers_of_a_manifest(columns: dict[str, list[str]], sentence: str, tmp_path: Path) -> None:
    """Tiles of other pixel sizes than the first row's were read at the first row's, without a word."""
    common = {"pair_id": list("ppqq"), "scanner": list("ABAB"), "path": ["a.tif"] * 4, "y": ["0"] * 4}
    pd.DataFrame({**common, **columns}).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(ManifestError, match=sentence):
        open_pairs(tmp_path / "m.csv")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00a"])
def test_a_csv_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ManifestError, match="is no table in UTF-8"):
        open_pairs(tmp_path / "m.csv")


def test_the_index_of_a_packed_folder_is_the_folder(packed: PackedTiles) -> None:
    """It was taken for unregistered tiles, to be read from the slides."""
    whole, named = open_pairs(packed.folder), open_pairs(packed.folder / "index.parquet")
    assert named.registered
    assert named.fingerprint == whole.fingerprint
    assert named.read is not None
    assert np.array_equal(named.read(3), packed.read(3))


def test_unpaired_rows_may_be_left_out(tmp_path: Path) -> None:
    table = {name: [*values, *values, values[0]] for name, values in GOOD.items()}
    table["pair_id"] = ["p", "q", "p", "q", "r", "s", "r", "s", "alone"]
    pd.DataFrame(table).to_csv(tmp_path / "pairs.csv", index=False)
    tiles = open_pairs(tmp_path / "pairs.csv", drop_unpaired=True)
    assert tiles.places.tolist() == ["p", "q", "r", "s"]
    assert tiles.notes == ("1 of 9 tiles show places seen once and are left out.",)


def test_bad_places_to_look(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        open_pairs(tmp_path / "none.csv")
    with pytest.raises(ManifestError, match="holds nothing to pair"):
        open_pairs(tmp_path)
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(ManifestError, match=r"\.csv or \.parquet"):
        open_pairs(tmp_path / "pairs.txt")
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ManifestError, match="pair_id, stain and scanner"):
        open_pairs(tmp_path / "a.csv")
    pd.DataFrame({"pair_id": [], "scanner": []}).to_csv(tmp_path / "empty.csv", index=False)
    with pytest.raises(ManifestError, match="holds no tiles"):
        open_pairs(tmp_path / "empty.csv")
    (tmp_path / "bad.tif.h5").write_bytes(b"no HDF5")
    with pytest.raises(ManifestError, match="truncated or no HDF5"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x: np.where(np.arange(4)[:, None] == 1, np.nan, x), "NaN or infinite features for 1 of 4 tiles"),
        (lambda x: np.where(np.arange(4)[:, None] == 2, 0.0, x), "zero features for 1 of 4 tiles"),
    ],
)
def test_bad_features(spoil: Any, sentence: str, tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    pd.DataFrame({**GOOD, "key": list("abcd")}).to_csv(tmp_path / "pairs.csv", index=False)
    tiles = open_pairs(tmp_path / "pairs.csv")
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    np.savez(tmp_path / "bad.npz", key=np.array(list("abcd")), features=spoil(x))
    with pytest.raises(StoreError, match=sentence):
        stored_features("m", tmp_path / "bad.npz", tiles)
    np.savez(tmp_path / "few.npz", key=np.array(list("abc")), features=x[:3])
    with pytest.raises(StoreError, match=r"m lacks 1 of 4 tiles \(d"):
        stored_features("m", tmp_path / "few.npz", tiles)
    with pytest.raises(StoreError, match="holds no features"):
        stored_features("m", tmp_path / "nowhere", tiles)
    with pytest.raises(ManifestError, match="names no pictures"):
        model_features("m", Embedder(encoders["student"]), tiles, tmp_path / "cache")


def test_one_place_of_a_slide_under_two_conditions_is_not_told_by_a_store(tmp_path: Path) -> None:
    """Simulated conditions keep their slide's name: each got the slide's own features, and cosines were 1."""
    write_embeddings(
        tmp_path / "s.h5",
        np.random.default_rng(0).standard_normal((2, 3)),
        np.array([[0, 0], [9, 0]]),
        flag=np.full(2, "", object),
        tissue_fraction=np.ones(2),
        header=make_header("embeddings/1", {}),
        coords_attrs={},
        features_attrs={},
    )
    frame = pd.DataFrame({**GOOD, "pair_id": list("pqpq"), "slide_id": "s", "x": [0, 9, 0, 9], "y": 0})
    with pytest.raises(StoreError, match="shows s at x = 0, y = 0 more than once"):
        stored_features("m", tmp_path, prepare(frame.assign(scanner=list("AABB")), "simulated"))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"key": list("abcda"), "features": np.ones((5, 3))}, "has features of a twice"),
        ({"key": list("abcd"), "features": np.ones((4, 1, 3))}, r"one vector per tile, .* got shape \(1, 3\) for a"),
        ({"key": list("abcd"), "features": np.ones(4)}, r"one vector per tile, .* got shape \(\) for a"),
        (
            {"a": np.ones(3), "b": np.ones(2), "c": np.ones(3), "d": np.ones(3)},
            r"of one length, got shape \(2,\) for b",
        ),
        ({"key": list("abcd"), "features": np.full((4, 1), "x")}, "should hold the arrays key"),
        ({"key": list("abcd"), "features": np.zeros((4, 2), "V2")}, "should hold the arrays key"),
        (None, "should hold the arrays key"),
    ],
)
def test_odd_features_by_key(arrays: dict[str, Any] | None, sentence: str, tmp_path: Path) -> None:
    """Of two vectors of one tile the last one was taken; the others gave a traceback."""
    frame = pd.DataFrame({"pair_id": list("ppqq"), "scanner": list("ABAB"), "key": list("abcd")})
    frame.to_csv(tmp_path / "m.csv", index=False)
    if arrays is None:
        (tmp_path / "f.npz").write_bytes(b"PK\x03\x04junk")
    else:
        np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(StoreError, match=sentence):
        stored_features("m", tmp_path / "f.npz", open_pairs(tmp_path / "m.csv"))


def test_published_subsets(plism: Path, tmp_path: Path) -> None:
    tiles = open_pairs(plism)
    np.save(tmp_path / "two.npy", np.array([3, 0]))
    assert read_index(tmp_path / "two.npy", tiles).tolist() == [3, 0]
    for bad in ([0, 4], [1, 1], [0.5, 1.0], [2]):
        np.save(tmp_path / "bad.npy", np.array(bad))
        with pytest.raises(StoreError, match="each 0 to 3 and at most once"):
            read_index(tmp_path / "bad.npy", tiles)
    (tmp_path / "text.npy").write_text(json.dumps([1, 2]))
    with pytest.raises(StoreError, match=r"should be a \.npy file"):
        read_index(tmp_path / "text.npy", tiles)


def test_a_published_subset_is_of_a_whole_set(plism: Path, tmp_path: Path) -> None:
    """A tile missing in one slide shifted the places after it, and the subset was of others without a word."""
    with h5py.File(plism / f"{SLIDES[0]}.h5", "a") as file:
        del file["tile_0_0_224"]
    np.save(tmp_path / "two.npy", np.array([2, 0]))
    with pytest.raises(StoreError, match=r"some are left out .3 of 4 places"):
        read_index(tmp_path / "two.npy", open_pairs(plism))


def test_a_published_subset_counts_by_position_whatever_the_order(tmp_path: Path) -> None:
    rows = [(x, y, scanner) for x, y in COORDS for scanner in "AB"]
    table = pd.DataFrame(rows, columns=["x", "y", "scanner"]).assign(pair_id=lambda t: t["x"] * 1000 + t["y"])
    table.to_csv(tmp_path / "m.csv", index=False)
    tiles = open_pairs(tmp_path / "m.csv")
    np.save(tmp_path / "two.npy", np.array([0, 3]))
    assert tiles.places[read_index(tmp_path / "two.npy", tiles)].tolist() == ["0", "448000"]


def test_unpaired_tiles_of_plism_may_be_left_out(plism: Path) -> None:
    """The message asked for --drop-unpaired, which PLISM's readers did not look at."""
    for slide in SLIDES[1:]:
        with h5py.File(plism / f"{slide}.h5", "a") as file:
            del file["tile_0_0_0"]
    with pytest.raises(ManifestError, match="pass --drop-unpaired"):
        open_pairs(plism)
    tiles = open_pairs(plism, drop_unpaired=True)
    assert len(tiles) == 9
    assert tiles.read is not None
    for row, (slide, x, y) in enumerate(tiles.frame[["slide_id", "x", "y"]].itertuples(index=False)):
        assert np.array_equal(tiles.read(row), tile(slide, x, y))


def test_plism_tiles_are_8_bit_rgb(plism: Path) -> None:
    """Tiles from 0 to 1 became black ones."""
    with h5py.File(plism / f"{SLIDES[1]}.h5", "a") as file:
        del file["tile_0_0_0"]
        file["tile_0_0_0"] = np.full((8, 8, 3), 0.7)
    tiles = open_pairs(plism)
    assert tiles.read is not None
    row = int(np.flatnonzero((tiles.frame["slide_id"] == SLIDES[1]) & (tiles.frame["tile_id"] == "tile_0_0_0"))[0])
    with pytest.raises(StoreError, match=r"8-bit RGB, got float64 \(8, 8, 3\)"):
        tiles.read(row)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_features_by_key_are_one_sentence(save: Any, tmp_path: Path) -> None:
    pd.DataFrame({"pair_id": list("ppqq"), "scanner": list("ABAB"), "key": list("abcd")}).to_csv(tmp_path / "m.csv")
    tiles, path, rng = open_pairs(tmp_path / "m.csv"), tmp_path / "f.npz", np.random.default_rng(0)
    save(path, key=np.array(list("abcd")), features=rng.standard_normal((4, 200)))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for number in range(150):
        if number % 3:
            spoilt = whole.copy()
            spoilt[rng.integers(0, len(whole), 5)] = rng.integers(0, 256, 5)
        else:
            spoilt = whole[: rng.integers(0, len(whole))]
        path.write_bytes(spoilt.tobytes())
        try:
            stored_features("m", path, tiles)
        except StoreError:
            refused += 1
    assert refused > 100


def test_damaged_parquet_is_one_sentence(tmp_path: Path) -> None:
    rows = [(slide, f"tile_0_{x}_{y}", png_bytes(tile(slide, x, y))) for slide in SLIDES for x, y in COORDS]
    pq.write_table(
        pa.table(dict(zip(("slide_id", "tile_id", "png"), zip(*rows, strict=True), strict=True))),
        path := tmp_path / "t.parquet",
    )
    whole = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    start = column.dictionary_page_offset or column.data_page_offset
    whole[start : start + 40] = bytes(40)
    path.write_bytes(whole)
    tiles = open_pairs(path)
    assert tiles.read is not None
    with pytest.raises(StoreError, match="is damaged"):
        tiles.read(0)
    pd.DataFrame({**GOOD}).to_parquet(path)
    whole = bytearray(path.read_bytes())
    whole[4:60] = bytes(56)
    path.write_bytes(whole)
    with pytest.raises(ManifestError, match="no readable Parquet"):
        open_pairs(path)


def test_damaged_kept_features_are_one_sentence(
    packed: PackedTiles, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    tiles, student = open_pairs(packed.folder), Embedder(encoders["student"], batch_size=32)
    model_features("m", student, tiles, tmp_path / "cache")
    block = next((tmp_path / "cache").glob("*.npy"))
    for content in (block.read_bytes()[:-40], b""):
        block.write_bytes(content)
        with pytest.raises(StoreError, match=r"is damaged .* --overwrite"):
            model_features("m", student, tiles, tmp_path / "cache")


def test_tiles_off_their_slide_are_not_white_ones(packed: PackedTiles, tmp_path: Path) -> None:
    """A table of exported tiles with their x and y in the slide was read as places of each tile: all white."""
    for scanner, shade in (("A", 50), ("B", 90)):
        for n in range(2):
            (tmp_path / f"{n}{scanner}.png").write_bytes(png_bytes(np.full((224, 224, 3), shade, np.uint8)))
    frame = pd.DataFrame({**GOOD, "path": ["0A.png", "1A.png", "0B.png", "1B.png"], "x": [0, 224, 0, 224], "y": 0})
    frame.assign(mpp_level0=0.5).to_csv(tmp_path / "pairs.csv", index=False)
    read = open_pairs(tmp_path / "pairs.csv").read
    assert read is not None
    assert read(0).max() == 50
    with pytest.raises(ManifestError, match=r"1A\.png has no tile at x = 224, y = 0, which is off the slide"):
        read(1)
    frame.assign(mpp_level0=0.5, x=[-223, 223, 0, 0]).to_csv(tmp_path / "pairs.csv", index=False)
    read = open_pairs(tmp_path / "pairs.csv").read
    assert read is not None
    assert [read(row).min() for row in range(2)] == [50, 50]  # a sliver of the slide, the rest white


def test_a_tile_without_a_share_is_unlabelled(tmp_path: Path) -> None:
    """An empty cell was Python's "could not convert string to float"."""
    pd.DataFrame({**GOOD, "label": list("abab"), "label_share": ["0.9", "", "0.7", "0.1"]}).to_csv(
        tmp_path / "pairs.csv", index=False
    )
    assert open_pairs(tmp_path / "pairs.csv").labelled().tolist() == [0, 2]


@pytest.mark.parametrize("odd", [None, "", 7])
def test_a_row_without_a_path_is_named(odd: object, tmp_path: Path) -> None:
    table = pd.DataFrame({"pair_id": list("ppqq"), "scanner": list("ABAB"), "path": ["a.png"] * 3 + [odd]})
    if odd == 7:
        table["path"] = 7
    table.to_parquet(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"name a file in the column path of each row, got .* in row [14]"):
        open_pairs(tmp_path / "m.parquet")


def test_columns_of_categories_may_have_holes(tmp_path: Path) -> None:
    table = pd.DataFrame({"pair_id": list("ppqq"), "scanner": list("ABAB"), "label": ["t", None, "t", None]})
    table.astype("category").to_parquet(tmp_path / "m.parquet")
    assert open_pairs(tmp_path / "m.parquet").frame["label"].tolist() == ["t", "", "t", ""]


def test_tiles_without_a_case_are_not_one_case(tmp_path: Path) -> None:
    """They were kept apart from each other and drawn together, as if of one patient."""
    table = pd.DataFrame({"pair_id": np.repeat([f"p{i}" for i in range(12)], 2), "scanner": list("AB") * 12})
    table["case"] = ["c0", "c0", "c1", "", " ", "", *[""] * 16, "c1", "c1"]
    table.to_csv(tmp_path / "m.csv", index=False)
    tiles = open_pairs(tmp_path / "m.csv")
    cases = tiles.frame.groupby("pair_id")["case"]
    assert (cases.nunique() == 1).all()
    assert cases.first()[["p0", "p1", "p11"]].tolist() == ["c0", "c1", "c1"]
    assert cases.first()["p2":"p9"].nunique() == 8  # type: ignore[misc]
    table.assign(case="").to_csv(tmp_path / "none.csv", index=False)
    assert open_pairs(tmp_path / "none.csv").apart_column() == "pair_id"
    loose = pd.DataFrame({"site": list("AABB"), "slide_id": list("stuv"), "case": ["c", None, None, "c"]})
    assert prepare(loose, "here").frame["case"].nunique() == 3


def test_two_names_of_one_column(tmp_path: Path) -> None:
    """Both became `site`, and pandas spoke of a DataFrame."""
    frame = pd.DataFrame({"label": list("abab"), "hospital": list("XXYY"), "medical_center": list("UUVV")})
    frame.to_csv(tmp_path / "tiles.csv", index=False)
    assert open_pairs(tmp_path / "tiles.csv").frame["site"].tolist() == list("UUVV")


def test_parquet_that_is_not_plism(tmp_path: Path) -> None:
    tiles = pd.DataFrame({"slide_id": "HE_A_to_x.tif", "tile_id": ["t_0_1_1", "t_0_1_1"], "png": b""})
    for frame, sentence in (
        (pd.DataFrame(GOOD), "lacks the columns slide_id, tile_id, png: pass a paired manifest by its own path"),
        (tiles, r"holds tile t_0_1_1 of HE_A_to_x\.tif twice \(1 such rows\)"),
        (None, "no readable Parquet file"),
    ):
        path = tmp_path / "tiles.parquet"
        path.write_bytes(b"PAR1") if frame is None else frame.to_parquet(path)
        with pytest.raises(ManifestError, match=sentence):
            open_pairs(tmp_path)


def test_tiles_of_unknown_site_are_left_out_and_counted() -> None:
    frame = pd.DataFrame({"site": ["A", "", "B", " "], "label": "t", "slide_id": list("abcd")})
    tiles = prepare(frame, "made up", lambda row: np.full((2, 2, 3), row, np.uint8))
    assert tiles.frame["slide_id"].tolist() == ["a", "c"]
    assert tiles.read is not None
    assert tiles.read(1)[0, 0, 0] == 2
    assert tiles.notes == ("2 of 4 tiles name no site and are left out.",)
    with pytest.raises(ManifestError, match="the column site is empty"):
        prepare(frame.assign(site=""), "made up")


def test_a_patients_cases_are_kept_together() -> None:
    """Two blocks of a patient are two cases, as they show other tissue; both sides of a comparison had one each."""
    rows = [
        {"pair_id": f"p{case}", "scanner": scanner, "case": f"c{case}", "patient_id": f"{case // 2}" if case else ""}
        for case in range(20)
        for scanner in "AB"
    ]
    tiles = prepare(pd.DataFrame(rows), "here")
    assert tiles.apart_column() == tiles.unit_column() == "patient"
    assert sorted(set(tiles.column("patient"))) == sorted({"c0", *(str(n) for n in range(10))})
    one = prepare(pd.DataFrame(rows).assign(patient_id="same"), "here")
    assert one.apart_column() == one.unit_column() == "case"
    assert prepare(pd.DataFrame(rows).drop(columns="patient_id"), "here").apart_column() == "case"


@pytest.mark.parametrize(("cases", "unit"), [(4, "pair_id"), (5, "case")])
def test_intervals_resample_cases_where_there_are_five(cases: int, unit: str) -> None:
    """Places of a case go up and down together: of 7 cases, intervals by places held the truth 28 % of the time."""
    rows = [
        {"pair_id": f"p{place}", "scanner": scanner, "case": f"c{place % cases}"}
        for place in range(40)
        for scanner in "AB"
    ]
    assert prepare(pd.DataFrame(rows), "here").unit_column() == unit
