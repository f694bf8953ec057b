"""Each layout read the way its tool reads, flagged tiles, resume, refusals, and what fails."""

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pathokd.cli.main import main
from pathokd.embed import convert_embeddings, read_embeddings, write_embeddings
from pathokd.embed.layouts import LAYOUTS, trident_folder
from pathokd.errors import StoreError
from pathokd.files import fingerprint, make_header

N, DIM, TILE_PX, MPP, MPP0 = 9, 6, 224, 0.5, 0.25
BAD = 3


def store(folder: Path, slide_id: str, *, seed: int = 0, dtype: str = "fp32", encoder: str = "vit tiny/1") -> Path:
    """What `pathokd embed` writes: nine tiles of one row, the fourth unreadable."""
    features = np.random.default_rng(seed).normal(size=(N, DIM)).astype(np.float32)
    coords = np.stack([np.arange(N) * 448 + 7, np.full(N, 1003)], axis=1)
    flag = np.array([""] * N, dtype=object)
    features[BAD], flag[BAD] = np.nan, "unreadable"
    original = [""] * N
    settings = {"slide_id": slide_id, "encoder": encoder, "weights_sha256": "ab" * 32, "readout": "cls"}
    settings |= {"precision": "fp32", "dtype": dtype, "mpp": MPP, "tile_px": TILE_PX, "icc": False}
    settings["tiles"] = fingerprint([coords[:, 0].tolist(), coords[:, 1].tolist(), original])
    path = folder / f"{slide_id}.h5"
    write_embeddings(
        path,
        features,
        coords,
        flag=flag,
        tissue_fraction=np.linspace(0.3, 1, N, dtype=np.float32),
        header=make_header("embeddings/1", settings),
        coords_attrs={
            "name": slide_id,
            "patch_size": TILE_PX,
            "patch_size_level0": 448,
            "patch_level": 0,
            "overlap": 0,
            "level0_magnification": 40.0,
            "target_magnification": 20.0,
            "level0_width": 5000,
            "level0_height": 4000,
            "mpp_level0": MPP0,
            "mpp_target": MPP,
            "mpp_source": "openslide",
        },
        features_attrs={"encoder": encoder, "name": slide_id, "weights_sha256": "ab" * 32, "precision": "fp32"},
        dtype=dtype,  # type: ignore[arg-type]
    )
    return path


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    folder = tmp_path / "embeddings"
    for number, name in enumerate(("a", "b é.1")):
        store(folder, name, seed=number)
    rows = [{"slide_id": name, "path": f"/slides/{name}.svs", "status": "ok"} for name in ("a", "b é.1")]
    pd.DataFrame(rows).assign(n_tiles=N, n_unreadable=1, seconds=1.0, message="").to_csv(
        folder / "summary.csv", index=False
    )
    return folder


def good(embeddings: Path, slide_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and corners of the eight good tiles, straight from HDF5."""
    with h5py.File(embeddings / f"{slide_id}.h5") as file:
        keep = np.arange(N) != BAD
        return file["features"][:][keep], file["coords"][:][keep]


def test_trident_reads_it(embeddings: Path, tmp_path: Path) -> None:
    """As `extract_slide_features` does: whole arrays, a batch axis added by the reader, attributes of coords."""
    convert_embeddings(embeddings, tmp_path / "out", "trident")
    with h5py.File(tmp_path / "out/20x_224px_0px_overlap/features_vit_tiny_1/b é.1.h5", "r") as f:
        coords, patch_features, attrs = f["coords"][:], f["features"][:], dict(f["coords"].attrs)
        assert dict(f["features"].attrs)["encoder"] == "vit tiny/1"
    batch = {"features": torch.from_numpy(patch_features).float().unsqueeze(0), "coords": torch.from_numpy(coords)}
    assert batch["features"].shape == (1, N - 1, DIM)
    features, corners = good(embeddings, "b é.1")
    np.testing.assert_array_equal(patch_features, features)
    np.testing.assert_array_equal(coords, corners)
    # TRIDENT makes patches anew from these: patch_size * src_mag // target_mag must be the side at level 0.
    assert attrs["patch_size"] * attrs["level0_magnification"] // attrs["target_magnification"] == 448
    assert attrs["patch_size_level0"] == 448
    assert {"overlap", "name", "savetodir", "level0_width", "level0_height"} <= attrs.keys()
    assert attrs["level0_magnification"].dtype.kind == "i"


def test_a_reader_of_one_n_d_files_takes_it_too(embeddings: Path, tmp_path: Path) -> None:
    """Some published feature sets are (1, n, d), so readers drop that axis if it is there; (n, d) must survive."""
    convert_embeddings(embeddings, tmp_path / "out", "trident")
    with h5py.File(tmp_path / "out/20x_224px_0px_overlap/features_vit_tiny_1/a.h5", "r") as f:
        features = torch.from_numpy(f["features"][:])
    assert features.ndim == 2
    assert (features.squeeze(0) if features.ndim == 3 else features).shape == (N - 1, DIM)
    assert features.squeeze(0).shape == (N - 1, DIM)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_clam_reads_it(embeddings: Path, tmp_path: Path, dtype: str) -> None:
    """`Generic_MIL_Dataset`: pt_files by torch.load, h5_files by key, and the tensor goes into a linear layer."""
    store(embeddings, "a", dtype=dtype)
    store(embeddings, "b é.1", seed=1, dtype=dtype)
    convert_embeddings(embeddings, tmp_path / "out", "clam")
    for slide_id in ("a", "b é.1"):
        bag = torch.load(tmp_path / f"out/pt_files/{slide_id}.pt", weights_only=True)
        with h5py.File(tmp_path / f"out/h5_files/{slide_id}.h5", "r") as hdf5_file:
            features, coords = hdf5_file["features"][:], hdf5_file["coords"][:]
        assert bag.dtype == torch.float32
        assert torch.nn.Linear(DIM, 2)(bag).isfinite().all()
        np.testing.assert_array_equal(bag.numpy(), features)
        np.testing.assert_array_equal(features, good(embeddings, slide_id)[0])
        np.testing.assert_array_equal(coords, good(embeddings, slide_id)[1])


def stamp_coords(h5: h5py.File) -> tuple[np.ndarray, float, int]:
    """The branches of STAMP's `get_coords` that concern microns: 2.0 first, then later versions."""
    if (size := h5.attrs.get("tile_size")) and h5.attrs.get("unit") == "um":
        return h5["coords"][:], float(size), int(h5.attrs["tile_size_px"])
    return h5["coords"][:], float(h5.attrs["tile_size_um"]), int(h5.attrs["tile_size_px"])


@pytest.mark.parametrize("older", [True, False])
def test_stamp_reads_it(embeddings: Path, tmp_path: Path, older: bool) -> None:
    """`BagDataset`: feats as float, coordinates in microns, every file a tile-level one, none of a newer STAMP."""
    convert_embeddings(embeddings, tmp_path / "out", "stamp")
    path = tmp_path / "out/vit_tiny_1/a.h5"
    if not older:
        with h5py.File(path, "a") as h5:
            del h5.attrs["tile_size"]
    with h5py.File(path, "r") as h5:
        feats = torch.from_numpy(h5["feats"][:]).float()
        coords_um, side_um, side_px = stamp_coords(h5)
        assert h5.attrs["extractor"] == "vit tiny/1"
        assert h5.attrs["feat_type"] == "tile"
        assert h5.attrs.get("encoder") is None  # would make STAMP take it for a slide's vector
        assert h5.attrs.get("stamp_version") is None
    features, corners = good(embeddings, "a")
    np.testing.assert_array_equal(feats, features)
    np.testing.assert_allclose(coords_um, corners * MPP0, rtol=1e-6)
    assert (side_um, side_px, side_um / side_px) == (112.0, 224, MPP)
    # STAMP's heat maps find the pixel again by dividing by the slide's mpp.
    assert np.round(coords_um / MPP0).astype(int).tolist() == corners.tolist()


def test_parquet_is_one_table_of_all_slides(embeddings: Path, tmp_path: Path) -> None:
    convert_embeddings(embeddings, tmp_path / "out", "parquet")
    frame = pd.read_parquet(tmp_path / "out/tiles")
    assert frame["slide_id"].value_counts().to_dict() == {"a": N, "b é.1": N}
    one = frame[frame["slide_id"] == "a"].reset_index(drop=True)
    assert one["flag"].to_list() == ["", "", "", "unreadable", "", "", "", "", ""]
    assert one["features"].isna().to_list() == [i == BAD for i in range(N)]
    np.testing.assert_array_equal(np.stack(one.loc[one["flag"] == "", "features"].to_list()), good(embeddings, "a")[0])
    np.testing.assert_array_equal(one[["x", "y"]].drop(BAD), good(embeddings, "a")[1])
    assert (one["tile_level0"] == 448).all()
    kind = pq.read_schema(tmp_path / "out/tiles/a.parquet").field("features").type
    assert pa.types.is_list(kind)  # null rows of fixed-size lists, pyarrow reads from 26 on only
    # Without a copy through Python: the flat values of the column are the matrix.
    column = pq.read_table(tmp_path / "out/tiles/a.parquet", filters=[("flag", "=", "")])["features"].combine_chunks()
    np.testing.assert_array_equal(column.flatten().to_numpy().reshape(-1, DIM), good(embeddings, "a")[0])


def test_anndata_reads_it(embeddings: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="pip install anndata")
    convert_embeddings(embeddings, tmp_path / "out", "anndata")
    found = anndata.read_h5ad(tmp_path / "out/b é.1.h5ad")
    features, corners = good(embeddings, "b é.1")
    np.testing.assert_array_equal(found.X, features)
    np.testing.assert_array_equal(found.obsm["spatial"], corners + 224.0)
    assert found.obs_names[0] == "7_1003"
    assert found.obs_names.is_unique
    np.testing.assert_array_equal(found.obs[["x", "y"]], corners)
    facts = found.uns["pathokd"]
    assert facts["features"]["encoder"] == "vit tiny/1"
    assert facts["coords"]["mpp_level0"] == MPP0
    assert facts["flagged"]["flag"].tolist() == ["unreadable"]
    assert (facts["flagged"]["x"].tolist(), facts["flagged"]["y"].tolist()) == ([7 + BAD * 448], [1003])


def test_a_missing_anndata_is_one_sentence(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(embeddings), "--layout", "anndata", "--out", str(tmp_path / "out")]) == 1
    assert "pip install anndata" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


LAYOUT_NAMES = [name for name in LAYOUTS if name != "anndata" or importlib.util.find_spec("anndata")]


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_run_goes_on_where_it_stopped(embeddings: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    first = convert_embeddings(embeddings, out, layout)  # type: ignore[arg-type]
    assert first["status"].to_list() == ["ok", "ok"]
    assert first["n_tiles"].to_list() == [N - 1, N - 1]
    assert first["n_flagged"].to_list() == [1, 1]
    files = [out / name for name in json.loads((out / "export.json").read_text())["files"]]
    assert sorted(files) == sorted(
        p for p in out.rglob("*") if (p.is_file() and p.parent != out) or p.suffix == ".h5ad"
    )
    lost = next(path for path in files if "b é.1" in path.name)
    whole = lost.read_bytes()
    lost.write_bytes(whole[: len(whole) // 2])  # truncated by a bad copy
    if lost.suffix == ".pt":
        lost.unlink()  # what a copy left out
    again = convert_embeddings(embeddings, out, layout)  # type: ignore[arg-type]
    assert dict(zip(again["slide_id"], again["status"], strict=True)) == {"a": "skipped", "b é.1": "ok"}
    assert again["n_tiles"].to_list() == [N - 1, N - 1]
    assert lost.stat().st_size == len(whole)
    assert not list(out.rglob("*.part"))


def test_other_settings_are_refused_and_overwritten_without_leftovers(embeddings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_embeddings(embeddings, out, "clam")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"layout = 'clam', this run asks for 'stamp'.*--overwrite"):
        convert_embeddings(embeddings, out, "stamp")
    store(embeddings, "a", encoder="other")
    store(embeddings, "b é.1", encoder="other")
    with pytest.raises(StoreError, match=r"encoder = 'vit tiny/1', this run asks for 'other'"):
        convert_embeddings(embeddings, out, "clam")
    assert (out / "pt_files/a.pt").is_file()
    convert_embeddings(embeddings, out, "stamp", overwrite=True)
    left = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert left == ["export.json", "notes.txt", "other/a.h5", "other/b é.1.h5", "summary.csv"]


def test_embeddings_made_anew_are_not_taken_for_the_old(embeddings: Path, tmp_path: Path) -> None:
    convert_embeddings(embeddings, tmp_path / "out", "parquet")
    with h5py.File(embeddings / "a.h5", "a") as file:  # the slide was repaired and embedded again
        file["flag"][BAD] = ""
        file["features"][BAD] = 1.0
    with pytest.raises(StoreError, match="flags"):
        convert_embeddings(embeddings, tmp_path / "out", "parquet")
    convert_embeddings(embeddings, tmp_path / "out", "parquet", overwrite=True)
    assert pd.read_parquet(tmp_path / "out/tiles/a.parquet")["features"].notna().all()


def test_files_of_others_are_not_replaced(embeddings: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out/h5_files/a.h5"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"features of another tool")
    with pytest.raises(StoreError, match="was not written by `pathokd export`"):
        convert_embeddings(embeddings, tmp_path / "out", "clam")
    assert theirs.read_bytes() == b"features of another tool"
    with pytest.raises(StoreError, match="folder of the embeddings itself"):
        convert_embeddings(embeddings, embeddings, "parquet")


def test_what_fails_is_a_row_and_the_rest_is_done(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(embeddings, "broken")
    path.write_bytes(path.read_bytes()[:2000])
    store(embeddings, "stranger", encoder="other")
    summary = pd.read_csv(embeddings / "summary.csv")
    lost = [{"slide_id": "gone", "status": "ok"}, {"slide_id": "sick", "status": "failed", "message": "No mpp."}]
    lost = [{"n_tiles": 9, **row} for row in lost]
    pd.concat([summary, pd.DataFrame(lost)]).to_csv(embeddings / "summary.csv", index=False)
    args = ["export", str(embeddings), "--layout", "clam", "--out", str(tmp_path / "out")]
    assert main(args) == 1
    captured = capsys.readouterr()
    assert "16 tiles of 2 slides" in captured.out
    assert "2 flagged tiles left out" in captured.out
    assert "4 of 6 slides failed" in captured.out
    rows = pd.read_csv(tmp_path / "out/summary.csv", keep_default_na=False).set_index("slide_id")
    assert rows["status"].to_dict() == {
        **dict.fromkeys(("a", "b é.1"), "ok"),
        **dict.fromkeys(("gone", "sick", "broken", "stranger"), "failed"),
    }
    assert "run `pathokd embed` again" in rows.loc["gone", "message"]
    assert rows.loc["sick", "message"] == "No mpp."
    assert "truncated" in rows.loc["broken", "message"]
    assert "encoder is 'other'" in rows.loc["stranger", "message"]
    assert main([*args, "--skip-errors"]) == 0
    assert not (tmp_path / "out/pt_files/broken.pt").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["{emb}"], "say whose files to write"),
        (["{emb}", "--layout", "clam", "--half"], "--half is for students"),
        (["{tmp}/run", "--layout", "clam"], "leave --layout out"),
        (["{tmp}", "--layout", "clam"], "holds no embeddings"),
    ],
)
def test_export_says_what_it_takes(
    args: list[str], sentence: str, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    filled = [arg.format(emb=embeddings, tmp=tmp_path) for arg in args]
    assert main(["export", *filled, "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("magnification", "name"), [(20.0, "20x_256px_32px_overlap"), (2.5, "2.5x_256px_32px_overlap")]
)
def test_tridents_folder_names(magnification: float, name: str) -> None:
    attrs = {"target_magnification": magnification, "patch_size": 256, "overlap": 32}
    assert trident_folder(attrs) == name


def test_what_embed_wrote_is_unchanged(embeddings: Path, tmp_path: Path) -> None:
    before = (embeddings / "a.h5").read_bytes()
    convert_embeddings(embeddings, tmp_path / "out", "trident")
    assert (embeddings / "a.h5").read_bytes() == before
    assert read_embeddings(embeddings / "a.h5").features.shape == (N, DIM)


def test_a_slide_embedded_again_from_another_file_is_not_taken_for_converted(tmp_path: Path) -> None:
    path = store(tmp_path / "features", "a")
    found = read_embeddings(path)
    for number in range(2):
        header = {**found.header, "slide": {"path": "a.svs", "mark": f"{number}" * 16, "mpp_level0": MPP0}}
        write_embeddings(
            path,
            found.features + number,
            found.coords,
            flag=found.flag,
            tissue_fraction=found.tissue_fraction,
            header=header,
            coords_attrs=found.coords_attrs,
            features_attrs=found.features_attrs,
        )
        if not number:
            for status in ("ok", "skipped"):
                assert convert_embeddings(path.parent, tmp_path / "out", "clam")["status"].tolist() == [status]
    with pytest.raises(StoreError, match=r"a\.h5 was made with slide = "):
        convert_embeddings(path.parent, tmp_path / "out", "clam")


def test_files_of_slides_that_are_gone_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bags of slides taken out of the cohort were silently trained on with the others."""
    for slide_id in ("a", "b"):
        store(tmp_path, slide_id)
    command = ["export", str(tmp_path), "--out", str(tmp_path / "out"), "--layout", "clam"]
    assert main(command) == 0
    assert "also holds" not in capsys.readouterr().err
    (tmp_path / "b.h5").unlink()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "also holds 2 files of slides that this run did not convert (h5_files/b.h5 is one)" in said
    assert main([*command, "--overwrite"]) == 0
    assert "also holds" not in capsys.readouterr().err
    assert [path.name for path in sorted((tmp_path / "out").rglob("*.*5"))] == ["a.h5"]
