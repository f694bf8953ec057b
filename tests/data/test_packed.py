"""Packing: what comes back is what went in, in whatever order, thread, process or program reads it."""

import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pathokd.data import pack as pack_module
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.data.wsi import WsiTiles, open_tiles, read_manifest, tile_keys
from pathokd.errors import ManifestError, StoreError
from pathokd.phantom import write_pyramid
from pathokd.slides.manifest import TileManifest
from pathokd.slides.slide import Slide

SHARD = 20


def test_every_tile_comes_back_close_to_the_slide(packed: Path) -> None:
    stored, source = PackedTiles(packed), WsiTiles(read_manifest(packed.parent))
    assert len(stored) == len(source) == 48
    assert stored.index["key"].to_list() == source.index["key"].to_list()
    for row in range(len(stored)):
        difference = np.abs(stored.read(row).astype(int) - source.read(row))
        assert difference.mean() < 3


def test_png_is_lossless(tmp_path: Path, packed: Path) -> None:
    pack_tiles(packed.parent, tmp_path, PackSpec(quality=0))
    stored, source = PackedTiles(tmp_path), WsiTiles(read_manifest(packed.parent))
    assert all(np.array_equal(stored.read(row), source.read(row)) for row in range(len(stored)))


def test_offsets_agree_with_tarfile_and_pillow(packed: Path) -> None:
    stored = PackedTiles(packed)
    for name, rows in stored.index.groupby("shard"):
        with tarfile.open(packed / str(name)) as tar:
            members = {member.name: member for member in tar.getmembers()}
            for row in rows.itertuples():
                member = members[f"{row.key}.jpg"]
                assert (member.offset_data, member.size) == (row.offset, row.size)
                file = tar.extractfile(member)
                assert file is not None
                assert np.abs(np.asarray(Image.open(file)).astype(int) - stored.read(row.Index)).max() <= 2
                meta = tar.extractfile(members[f"{row.key}.json"])
                assert meta is not None
                assert json.load(meta)["slide_id"] == row.slide_id


def test_webdataset_pairs_image_and_json_by_the_first_dot(packed: Path) -> None:
    # WebDataset's rule: the key ends at the first dot of the file name.
    with tarfile.open(packed / "shard-000000.tar") as tar:
        names = tar.getnames()
    keys = [Path(name).name.split(".")[0] for name in names]
    assert keys[0::2] == keys[1::2]
    assert len(set(keys)) == len(keys) / 2
    assert [name.split(".", 1)[1] for name in names] == ["jpg", "json"] * (len(names) // 2)


def test_threads_pickles_and_forks_read_the_same(packed: Path) -> None:
    stored = PackedTiles(packed)
    expected = [stored.read(row).tobytes() for row in range(len(stored))]
    with ThreadPoolExecutor(4) as pool:
        assert [tile.tobytes() for tile in pool.map(stored.read, range(len(stored)))] == expected
    copy = pickle.loads(pickle.dumps(stored))
    assert copy.read(7).tobytes() == expected[7]
    child = os.fork()
    if child == 0:
        os._exit(0 if stored.read(7).tobytes() == expected[7] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_keys_are_unique_even_where_names_collide() -> None:
    frame = pd.DataFrame({"slide_id": ["a.b", "a_b"], "x": [0, 0], "y": [0, 0]})
    keys = tile_keys(frame)
    assert len(set(keys)) == 2
    assert not any("." in key for key in keys)


def test_an_interrupted_run_keeps_whole_shards(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PackedTiles(packed)
    write = pack_module._write_shard
    calls = []

    def dies_in_the_third(*args: object) -> None:
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_module, "_write_shard", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack_tiles(packed.parent, tmp_path, PackSpec(shard_tiles=SHARD))
    assert not (tmp_path / "index.parquet").exists()
    with pytest.raises(ManifestError, match="pathokd pack"):
        PackedTiles(tmp_path)
    pack_tiles(packed.parent, tmp_path, PackSpec(shard_tiles=SHARD))
    assert calls == [0, 1, 2, 2]
    again = PackedTiles(tmp_path)
    pd.testing.assert_frame_equal(again.index, whole.index)
    assert not list(tmp_path.rglob("*.part"))


def test_other_settings_are_refused_by_name_unless_overwritten(tmp_path: Path, packed: Path) -> None:
    pack_tiles(packed.parent, tmp_path, PackSpec(quality=90))
    with pytest.raises(StoreError, match="quality = 90, this run asks for 50"):
        pack_tiles(packed.parent, tmp_path, PackSpec(quality=50))
    pack_tiles(packed.parent, tmp_path, PackSpec(quality=50), overwrite=True)
    assert PackedTiles(tmp_path).header["settings"]["quality"] == 50


def test_tables_of_several_magnifications_become_one_set(tmp_path: Path, packed: Path) -> None:
    fine = read_manifest(packed.parent)
    corners = fine.frame[(fine.frame["x"] % 128 == 0) & (fine.frame["y"] % 128 == 0)]
    corners = corners.assign(mpp=1.0, path=[f"{Path(path).parent}/./{Path(path).name}" for path in corners["path"]])
    coarse = TileManifest(corners.drop(columns="patient"), replace(fine.spec, mpp=1.0))
    coarse.write(tmp_path / "coarse/manifest.parquet")
    folders = [packed.parent, tmp_path / "coarse"]
    assert pack_tiles(folders, tmp_path / "packed", PackSpec(quality=0)).tiles == 48 + 12
    assert pack_tiles(folders, tmp_path / "packed", PackSpec(quality=0)).tiles == 48 + 12  # as it is there
    stored = PackedTiles(tmp_path / "packed")
    assert stored.index["key"].is_unique
    assert (stored.index["patient"] == "").equals(stored.index["mpp"] == 1.0)
    for row, place in enumerate(stored.index.itertuples()):
        with Slide(place.path) as slide:
            assert np.array_equal(stored.read(row), slide.read_tile(place.x, place.y, mpp=place.mpp, tile_px=64))
    with pytest.raises(StoreError, match="manifest"):
        pack_tiles(packed.parent, tmp_path / "packed", PackSpec(quality=0))


@pytest.mark.parametrize(
    ("changed", "spec", "said"),
    [
        ({"mpp": 1.0, "tile_px": 32}, {"mpp": 1.0, "tile_px": 32}, "several values of tile_px, 32 and 64"),
        ({}, {"icc": True}, "several values of icc, False and True"),
        ({}, {}, r"slide 0\.é at \(0, 0\), 0\.5 um/px, stands in two tables"),
        ({"mpp": 1.0, "path": "elsewhere.tif"}, {"mpp": 1.0}, "two values of path, .*elsewhere.tif: give each slide"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(
    changed: dict[str, Any], spec: dict[str, Any], said: str, tmp_path: Path, packed: Path
) -> None:
    first = read_manifest(packed.parent)
    TileManifest(first.frame.assign(**changed), replace(first.spec, **spec)).write(tmp_path / "manifest.parquet")
    with pytest.raises(ManifestError, match=said):
        pack_tiles([packed.parent, tmp_path], tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_corrupt_tile_is_left_out_and_told(tmp_path: Path, packed: Path) -> None:
    pixels = np.random.default_rng(0).integers(90, 250, (256, 256, 3), dtype=np.uint8)
    write_pyramid(tmp_path / "bad.tif", pixels, 0.5, tile_px=64, corrupt=[(0, 0, 0)])
    manifest = read_manifest(packed.parent)
    frame = manifest.frame[manifest.frame["slide_id"] == "slide 0.é"].assign(path=str(tmp_path / "bad.tif"))
    TileManifest(frame, manifest.spec).write(tmp_path / "manifest.parquet")
    result = pack_tiles(tmp_path, tmp_path / "packed")
    assert result.tiles == 15
    assert result.unreadable[["x", "y", "flag"]].values.tolist() == [[0, 0, "unreadable"]]
    assert pd.read_csv(tmp_path / "packed/unreadable.csv")["message"].str.contains("bad.tif").all()
    assert len(PackedTiles(tmp_path / "packed")) == 15
    assert pack_tiles(tmp_path, tmp_path / "packed").unreadable.equals(result.unreadable)
    write_pyramid(tmp_path / "bad.tif", pixels, 0.5, tile_px=64)
    with pytest.raises(StoreError, match=r"on another slide slide 0\.é.* `pathokd pack` with --overwrite"):
        pack_tiles(tmp_path, tmp_path / "packed")  # copied anew, as the message asks for, it still lacked a tile
    assert pack_tiles(tmp_path, tmp_path / "packed", overwrite=True).tiles == 16


def test_an_id_of_digits_stays_one(tmp_path: Path, packed: Path) -> None:
    """Read back, slide 007 was 7."""
    write_pyramid(tmp_path / "bad.tif", np.full((256, 256, 3), 200, np.uint8), 0.5, tile_px=64, corrupt=[(0, 0, 0)])
    manifest = read_manifest(packed.parent)
    frame = manifest.frame[manifest.frame["slide_id"] == "slide 0.é"]
    frame = frame.assign(path=str(tmp_path / "bad.tif"), slide_id="007")
    TileManifest(frame, manifest.spec).write(tmp_path / "manifest.parquet")
    for _ in range(2):
        assert pack_tiles(tmp_path, tmp_path / "packed").unreadable["slide_id"].tolist() == ["007"]


def test_the_index_of_a_packed_folder_is_the_folder(packed: Path) -> None:
    """The index itself was refused as a manifest of another version."""
    assert np.array_equal(open_tiles(packed / "index.parquet").read(3), open_tiles(packed).read(3))


def test_damage_is_one_sentence(tmp_path: Path, packed: Path) -> None:
    pack_tiles(packed.parent, tmp_path)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(StoreError, match="truncated"):
        PackedTiles(tmp_path).read(20)
    shard.unlink()
    with pytest.raises(StoreError, match="missing"):
        PackedTiles(tmp_path).read(0)
    (tmp_path / "index.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ManifestError, match="no readable Parquet"):
        PackedTiles(tmp_path)
    with pytest.raises(ManifestError, match="holds no tiles"):
        open_tiles(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["index.parquet", "manifest.parquet"])
def test_tables_with_spoilt_bytes_are_one_sentence(name: str, tmp_path: Path, packed: Path) -> None:
    """Some bytes gave pyarrow's OSError, pandas' KeyError or JSON's own error."""
    folder = packed if name == "index.parquet" else packed.parent
    whole, rng, refused = np.frombuffer((folder / name).read_bytes(), np.uint8), np.random.default_rng(0), 0
    for _ in range(60):
        spoilt = whole.copy()
        spoilt[rng.integers(0, len(whole), 4)] = rng.integers(128, 256, 4)
        (tmp_path / name).write_bytes(spoilt.tobytes())
        try:
            open_tiles(tmp_path)
        except ManifestError:
            refused += 1
    assert refused > 20
