"""Nothing that exists is lost: files of others, links, leftovers of killed runs, full and read-only disks."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathokd.embed import embed_slides, read_embeddings, read_good, read_header, verify_embeddings
from pathokd.errors import StoreError
from pathokd.files import LEFTOVER_S
from pathokd.models import Encoder
from pathokd.slides.manifest import TileManifest

MakeSlide = Callable[..., Path]
MakeManifest = Callable[[list[Path]], TileManifest]


@pytest.fixture
def manifest(make_slide: MakeSlide, make_manifest: MakeManifest) -> TileManifest:
    return make_manifest([make_slide("a", seed=1)])


def clam(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 3))
        file["coords"] = np.zeros((2, 2))


@pytest.mark.parametrize("make", [clam, lambda path: path.write_bytes(b"notes of a colleague")])
def test_a_file_of_another_program_is_not_replaced(
    make: Callable[[Path], object], encoder: Encoder, manifest: TileManifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out / "a.h5")
    before = (out / "a.h5").read_bytes()
    with pytest.raises(StoreError, match=r"a\.h5 is there and `pathokd embed` did not write it"):
        embed_slides(encoder, manifest, out)
    assert (out / "a.h5").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["a.h5"]
    assert embed_slides(encoder, manifest, out, overwrite=True)["status"].tolist() == ["ok"]


@pytest.mark.parametrize("content", [b"", bytes(4096)])
def test_what_a_crash_leaves_is_made_again(
    content: bytes, encoder: Encoder, manifest: TileManifest, tmp_path: Path
) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    assert embed_slides(encoder, manifest, tmp_path)["status"].tolist() == ["ok"]
    assert verify_embeddings(tmp_path)["status"].tolist() == ["ok"]


def test_the_summary_of_another_verb_is_not_replaced(encoder: Encoder, manifest: TileManifest, tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("slide_id,path,status,n_tiles,mpp_level0\n")
    with pytest.raises(StoreError, match="choose another output folder"):
        embed_slides(encoder, manifest, tmp_path)
    assert not list(tmp_path.glob("*.h5"))


def test_a_link_is_replaced_and_not_followed(encoder: Encoder, manifest: TileManifest, tmp_path: Path) -> None:
    precious, out = tmp_path / "precious.h5", tmp_path / "out"
    out.mkdir()
    clam(precious)
    before = precious.read_bytes()
    (out / "a.h5").symlink_to(precious)
    with pytest.raises(StoreError, match="did not write it"):
        embed_slides(encoder, manifest, out)
    embed_slides(encoder, manifest, out, overwrite=True)
    assert precious.read_bytes() == before
    assert not (out / "a.h5").is_symlink()


def test_folders_and_files_in_the_way_are_named(encoder: Encoder, manifest: TileManifest, tmp_path: Path) -> None:
    (tmp_path / "out" / "a.h5").mkdir(parents=True)
    with pytest.raises(StoreError, match="is a folder where a file of features should go"):
        embed_slides(encoder, manifest, tmp_path / "out", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file: name a folder"):
        embed_slides(encoder, manifest, tmp_path / "file")


def test_leftovers_of_killed_runs_go_once_they_are_old(
    encoder: Encoder, manifest: TileManifest, tmp_path: Path
) -> None:
    old, young, other = (tmp_path / name for name in (".b.h5.12345678.part", ".c.h5.12345678.part", ".d.txt.1.part"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - LEFTOVER_S - 60,) * 2)
    embed_slides(encoder, manifest, tmp_path)
    assert not old.exists()
    assert young.exists()
    assert other.exists()


def test_features_of_slides_that_are_gone_are_told(
    encoder: Encoder, manifest: TileManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slides taken out of the cohort kept their features, which were exported and trained on with the others."""
    embed_slides(encoder, manifest, tmp_path)
    assert "also holds" not in capsys.readouterr().err
    (tmp_path / "a.h5").rename(tmp_path / "gone.h5")
    embed_slides(encoder, manifest, tmp_path)
    assert "also holds features of 1 slides without tiles here (gone is one)" in capsys.readouterr().err


def test_every_cut_and_every_lost_page_is_noticed(encoder: Encoder, manifest: TileManifest, tmp_path: Path) -> None:
    """`verify` never accepts a partial file, be it short or of the right length with pages of zeros."""
    embed_slides(encoder, manifest, tmp_path)
    path = tmp_path / "a.h5"
    whole = path.read_bytes()
    assert verify_embeddings(tmp_path)["status"].tolist() == ["ok"]
    for length in np.random.default_rng(0).integers(len(whole), size=40).tolist():
        path.write_bytes(whole[:length])
        assert verify_embeddings(tmp_path)["status"].tolist() == ["damaged"], length
    for start in range(0, len(whole), 512):
        page = whole[start : start + 512]
        if any(page):
            path.write_bytes(whole[:start] + bytes(len(page)) + whole[start + 512 :])
            assert verify_embeddings(tmp_path)["status"].tolist() == ["damaged"], start
            for read in (read_header, read_good):  # they need not notice, but must come back
                with contextlib.suppress(StoreError):
                    read(path)
            with contextlib.suppress(StoreError):  # a lost end looks like a file that other code wrote to
                read_embeddings(path)
                assert start + 512 >= len(whole) - 47, start
    path.write_bytes(whole)
    assert verify_embeddings(tmp_path)["status"].tolist() == ["ok"]
