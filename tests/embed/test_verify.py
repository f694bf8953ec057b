"""`verify` accepts what `embed` wrote, and names what was lost, damaged, exchanged or never made."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathokd.cli.main import main
from pathokd.embed import convert_embeddings, embed_slides, verify_embeddings
from pathokd.embed.store import sealed
from pathokd.errors import StoreError
from pathokd.models import Encoder
from pathokd.report.overlay import draw_overlays
from pathokd.slides import TileSpec, find_slides, tile_slides
from pathokd.slides.manifest import TileManifest

MakeSlide = Callable[..., Path]
MakeManifest = Callable[[list[Path]], TileManifest]


@pytest.fixture
def folder(encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path) -> Path:
    slides = [make_slide("a", seed=1), make_slide("b", seed=2, corrupt=True), make_slide("c", seed=3)]
    embed_slides(encoder, make_manifest(slides), tmp_path / "out")
    return tmp_path / "out"


def status(folder: Path) -> dict[str, str]:
    return verify_embeddings(folder).set_index("slide_id")["status"].to_dict()


def test_sound_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_embeddings(folder).set_index("slide_id")
    assert found["status"].to_dict() == {"a": "ok", "b": "ok", "c": "ok"}
    assert found.loc["b", "n_flagged"] > 0
    assert main(["verify", str(folder)]) == 0
    assert "3 of 3 slides are sound: 48 tiles" in capsys.readouterr().out


def test_lost_and_truncated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.h5").unlink()
    whole = (folder / "c.h5").read_bytes()
    (folder / "c.h5").write_bytes(whole[: len(whole) // 2])
    assert status(folder) == {"a": "missing", "b": "ok", "c": "damaged"}
    assert main(["verify", str(folder), "--skip-errors"]) == 1
    assert "a: missing" in capsys.readouterr().out


def change(path: Path, name: str, row: int, value: float) -> None:
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        values[row] = value
        file[name][...] = values
    path.write_bytes(sealed(path.read_bytes()))  # as a program would that writes such files


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", np.nan, "1 good tiles have features that are not finite"),
        ("features", np.inf, "not finite"),
        ("coords", 7, "coordinates are not those"),
    ],
)
def test_changed_inside(folder: Path, name: str, value: float, message: str) -> None:
    change(folder / "a.h5", name, 3, value)
    found = verify_embeddings(folder).set_index("slide_id")
    assert found.loc["a", "status"] == "damaged"
    assert message in found.loc["a", "message"]


def test_a_file_of_another_run(folder: Path, encoder: Encoder, make_manifest: MakeManifest, tmp_path: Path) -> None:
    embed_slides(encoder, make_manifest([tmp_path / "c.tiff"]), tmp_path / "other", readout="cls+mean")
    (folder / "c.h5").write_bytes((tmp_path / "other/c.h5").read_bytes())
    found = verify_embeddings(folder).set_index("slide_id")
    assert found.loc["c", "status"] == "different"
    assert "readout is 'cls+mean', in the first file it is 'cls'" in found.loc["c", "message"]


def test_fewer_rows_than_the_summary_says(folder: Path) -> None:
    with h5py.File(folder / "a.h5", "r+") as file:
        for name in ("features", "coords", "flag", "tissue_fraction"):
            values = file[name][:-1]
            attrs = dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values).attrs.update(attrs)
    (folder / "a.h5").write_bytes(sealed((folder / "a.h5").read_bytes()))
    found = verify_embeddings(folder).set_index("slide_id")
    assert "rows, the summary says" in found.loc["a", "message"]


def test_a_file_that_was_changed_since(folder: Path) -> None:
    with h5py.File(folder / "a.h5", "r+") as file:
        file.attrs["note"] = "mine"
    assert status(folder)["a"] == "damaged"


def test_what_is_no_folder_of_embeddings(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\.h5 is a file: give the folder that `pathokd embed` wrote"):
        verify_embeddings(folder / "a.h5")  # which it said held no embeddings
    with pytest.raises(StoreError, match=r"a\.h5 is a file: name a folder"):
        draw_overlays(folder, folder / "a.h5")
    with pytest.raises(StoreError, match="holds no embeddings"):
        verify_embeddings(tmp_path)
    (tmp_path / "summary.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StoreError, match="holds a summary that is not one of `pathokd embed`"):
        verify_embeddings(tmp_path)


def test_the_summary_that_was_written_last_is_believed(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest, out = make_manifest([make_slide("a", seed=1)]), tmp_path / "out"
    embed_slides(encoder, manifest, out)
    less = TileManifest(manifest.frame.iloc[:5], manifest.spec)
    embed_slides(encoder, less, out, shard=(0, 2), overwrite=True)
    embed_slides(encoder, less, out, shard=(1, 2), overwrite=True)
    assert status(out) == {"a": "ok"}


@pytest.mark.parametrize("verb", ["tile", "overlay", "export"])
def test_summaries_of_embed_are_not_written_over(
    verb: str, encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    slide, out, place = make_slide("a", seed=1), tmp_path / "out", tmp_path / "out"
    embed_slides(encoder, make_manifest([slide]), out)
    if verb == "export":  # which refuses the folder itself
        place = tmp_path / "other"
        embed_slides(encoder, make_manifest([slide]), place)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    run: dict[str, Callable[[], object]] = {
        "tile": lambda: tile_slides(find_slides(slide), TileSpec(min_tissue=0), place),
        "overlay": lambda: draw_overlays(out, place),
        "export": lambda: convert_embeddings(out, place, "clam"),
    }
    with pytest.raises(StoreError, match=rf"summary\.csv is there and no summary of `pathokd {verb}`: choose another"):
        run[verb]()
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("word", ["pen", "unreadable"])
def test_tiles_that_the_manifest_flags_are_sound(
    word: str, encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide("a", seed=1)])
    manifest.frame.loc[3, "flag"] = word
    embed_slides(encoder, manifest, tmp_path / "out")
    assert status(tmp_path / "out") == {"a": "ok"}


def test_a_tiled_folder_is_no_folder_of_embeddings(make_slide: MakeSlide, tmp_path: Path) -> None:
    tile_slides(find_slides(make_slide("a", seed=1)), TileSpec(min_tissue=0), tmp_path / "tiles")
    with pytest.raises(StoreError, match="holds a summary that is not one of `pathokd embed`"):
        verify_embeddings(tmp_path / "tiles")


def test_shards_share_a_folder(
    encoder: Encoder, make_slide: MakeSlide, make_manifest: MakeManifest, tmp_path: Path
) -> None:
    manifest = make_manifest([make_slide(name, seed=number) for number, name in enumerate("abcde")])
    parts = [embed_slides(encoder, manifest, tmp_path / "out", shard=(number, 2)) for number in range(2)]
    assert [part["slide_id"].tolist() for part in parts] == [["a", "c", "e"], ["b", "d"]]
    assert sorted(path.name for path in (tmp_path / "out").glob("summary*")) == [
        "summary-0-of-2.csv",
        "summary-1-of-2.csv",
    ]
    assert status(tmp_path / "out") == dict.fromkeys("abcde", "ok")
    (tmp_path / "out/d.h5").unlink()
    assert status(tmp_path / "out")["d"] == "missing"
    with pytest.raises(ValueError, match="i from 0 to n - 1"):
        embed_slides(encoder, manifest, tmp_path / "out", shard=(2, 2))
