"""What a targets folder takes, which tiles and views it is of, and that nothing else is read from it."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from pathokd.data import datamodule, targets
from pathokd.data.batch import Draw, TileSource
from pathokd.data.pack import PackSpec, pack_tiles
from pathokd.data.packed import PackedTiles
from pathokd.data.targets import TargetSpec, TargetStore, bytes_per_tile, layout, tile_identity
from pathokd.data.views import Geometry, Views, d4, orientation, resize, whole_tile
from pathokd.data.wsi import WsiTiles, read_manifest
from pathokd.embed.targets import write_targets
from pathokd.errors import StoreError
from pathokd.models import TeacherSpec, build_teacher


@pytest.fixture(scope="module")
def store(packed: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    out = tmp_path_factory.mktemp("targets") / "t"
    return write_targets(
        build_teacher(TeacherSpec(str(tiny_teacher))), PackedTiles(packed), out, TargetSpec("patches", dtype="int8")
    )


def copy_of(store: TargetStore, folder: Path) -> Path:
    shutil.copytree(store.folder, folder / "copy")
    return folder / "copy"


@pytest.mark.parametrize(
    ("spec", "gigabytes"),
    [
        (TargetSpec("cls"), 3.1),
        (TargetSpec("cls+mean"), 6.1),
        (TargetSpec("patches"), 786 + 3),
        (TargetSpec("patches", pca=256, dtype="int8"), 66 + 1.5 + 1.0),  # and a scale for each token
        (TargetSpec("pooled"), 49 + 3),
    ],
    ids=["cls", "cls+mean", "patches", "pca", "pooled"],
)
def test_a_million_tiles_of_a_vit_g_take_what_peers_md_says(spec: TargetSpec, gigabytes: float) -> None:
    """Widths and grid of H-optimus-0; every kind holds the class token too."""
    assert bytes_per_tile(layout(spec, 1536, (16, 16))) * 1e6 / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": "mean"}, "cls, cls+mean"),
        ({"dtype": "int4"}, "fp32, fp16, int8"),
        ({"pca": 8}, "stores none"),
        ({"tokens": "patches", "pca": 0}, "at least 1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        TargetSpec(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 x 4 patches or more"):
        TargetSpec("pooled").grid((3, 3))


def test_orientations_are_fixed_and_evenly_spread() -> None:
    # First bytes 0x9e, 0xcc, 0x4a of `printf KEY | sha256sum`, modulo 8: a change would spoil all targets on disk.
    assert [orientation(key) for key in ("slide-0-0", "slide-0-224", "é")] == [6, 4, 2]
    counts = np.bincount([orientation(f"slide-{i}-0") for i in range(8000)], minlength=8)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_the_fixed_view_is_pixel_for_pixel_one_of_those_that_fit_draws() -> None:
    """Online, the whole tile at the geometry's size in a drawn orientation: the cached view is the one of its key."""
    tile = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    views = Views(Geometry(32), seed=3)
    drawn = {views(tile, Draw(0, epoch))["clean"].tobytes() for epoch in range(60)}
    assert drawn == {whole_tile(tile, 32, element).tobytes() for element in range(8)}
    for element in range(8):
        fixed = [views(tile, Draw(0, epoch), element)["clean"] for epoch in range(3)]
        assert all(np.array_equal(view, d4(resize(tile, 32), element)) for view in fixed)


def test_identity_sees_tiles_order_and_pixels_but_not_the_place(packed: Path, tmp_path: Path) -> None:
    mine = tile_identity(PackedTiles(packed))
    shutil.copytree(packed, tmp_path / "moved")
    assert tile_identity(PackedTiles(tmp_path / "moved")) == mine
    manifest = packed.parent / "manifest.parquet"
    pack_tiles(manifest, tmp_path / "shards", PackSpec(shard_tiles=7), workers=1)
    pack_tiles(manifest, tmp_path / "coarse", PackSpec(quality=50), workers=1)
    assert tile_identity(PackedTiles(tmp_path / "shards")) == mine
    others = [PackedTiles(tmp_path / "coarse"), WsiTiles(read_manifest(manifest))]
    turned = PackedTiles(packed)
    turned._index = turned._index.iloc[::-1].reset_index(drop=True)
    assert len({mine, *map(tile_identity, (*others, turned))}) == 4


def test_a_store_reads_the_row_it_is_asked_for_also_when_pickled(store: TargetStore) -> None:
    whole = {path.stem: np.load(path) for path in store.folder.glob("*.npy")}
    assert set(whole) == {"cls", "cls_scale", "patches", "patches_scale"}
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 20_000  # the path, not the numbers
    for row in (0, 17, len(store) - 1):
        for some in (store.read(row), copy.read(row)):
            assert all(np.array_equal(some[name], whole[name][row]) for name in whole)


def test_geometry_that_contradicts_is_refused_by_name(store: TargetStore) -> None:
    store.check_geometry(Geometry(32))
    for geometry, words in (
        (Geometry(32, (0.4, 1.0)), r"geometry\.scale is \(0\.4, 1\.0\).*set it to \(1\.0, 1\.0\)"),
        (Geometry(32, d4=False), r"geometry\.d4 is False.*set it to True"),
        (Geometry(64), r"geometry\.size_px is 64.*set it to 32"),
    ):
        with pytest.raises(StoreError, match=words):
            store.check_geometry(geometry)


def test_tiles_are_identified_once_at_start_up(
    store: TargetStore, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(source: TileSource) -> str:
        calls.append(source)
        return tile_identity(source)

    for module in (targets, datamodule):
        monkeypatch.setattr(module, "tile_identity", counted)
    data = datamodule.TileDataModule(
        str(packed),
        batch_size=4,
        workers=0,
        geometry=Geometry(store.settings["view_px"]),
        targets=dict.fromkeys("ab", str(store.folder)),
    )
    assert data.train_dataloader().tiles == data.train_dataloader().tiles != ""
    assert len(calls) == 1


def test_other_tiles_are_refused(store: TargetStore, packed: Path, tmp_path: Path) -> None:
    store.check_tiles(PackedTiles(packed))
    pack_tiles(packed.parent / "manifest.parquet", tmp_path / "coarse", PackSpec(quality=50), workers=1)
    with pytest.raises(StoreError, match=r"computed on other tiles: on the 48 of PackedTiles.*the 48 of this run"):
        store.check_tiles(PackedTiles(tmp_path / "coarse"))


def test_what_is_not_whole_is_refused(store: TargetStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no targets: make them with `pathokd cache"):
        TargetStore(tmp_path / "nothing")
    folder = copy_of(store, tmp_path)
    with open(folder / "patches.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(StoreError, match=r"patches\.npy cannot be read"):
        TargetStore(folder)
    np.save(folder / "patches.npy", np.zeros((3, 2), np.int8))
    with pytest.raises(StoreError, match=r"holds int8 \(3, 2\), its header says \|i1 \(48, 16, 24\)"):
        TargetStore(folder)
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "schema": "targets/0"}))
    with pytest.raises(StoreError, match="schema 'targets/0'"):
        TargetStore(folder)
    (folder / "header.json").unlink()
    (folder / ".parts").mkdir()
    with pytest.raises(StoreError, match="unfinished: run the same"):
        TargetStore(folder)
