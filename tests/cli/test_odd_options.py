"""Options of `embed` and `compare` that cannot be, or that would be left aside without a word: one sentence each."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pathokd.cli.compare import _head_of
from pathokd.cli.main import main
from pathokd.phantom import make_scene, render, write_pyramid


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiled")
    scan = render(make_scene(3, 420.0, margin_um=40.0, region_um=120.0), "HE", "S50")
    slide = write_pyramid(folder / "one.tif", scan, 0.5)
    assert main(["tile", str(slide), "--out", str(folder / "tiles"), "--tile-px", "128"]) == 0
    return folder


@pytest.mark.parametrize("option", [["--mpp", "0"], ["--tile-px", "0"], ["--min-tissue", "0.9"], ["--mpp-level0", "0"]])
def test_tiled_slides_are_not_tiled_otherwise(
    option: list[str], tiles: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(tiny_teacher), str(tiles / "tiles"), "--out", str(tmp_path / "out"), *option]) == 1
    assert "is tiled already: --mpp, --tile-px, --min-tissue and --mpp-level0 are for" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--mpp", "0"], ["--tile-px", "0"], ["--mpp", "-1"]])
def test_nought_is_not_the_default(
    option: list[str], tiles: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(tiny_teacher), str(tiles / "one.tif"), "--out", str(tmp_path / "out"), *option]) == 1
    assert "must be above 0, got" in capsys.readouterr().err


def test_a_shard_in_odd_digits(tiles: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(tiny_teacher), str(tiles / "tiles"), "--out", "x", "--shard", "\u00b2/3"]) == 1
    assert "--shard takes I/N" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--workers", "0"], ["--batch-size", "0"]])
def test_none_at_a_time(
    option: list[str], tiles: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with an empty summary stayed behind, and `verify` called it one of no embeddings."""
    assert main(["embed", str(tiny_teacher), str(tiles / "tiles"), "--out", str(tmp_path / "out"), *option]) == 1
    assert "should be at least 1, got 0." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_of_a_tiled_folder(tiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended in "'n_unreadable'." and said no more."""
    assert main(["verify", str(tiles / "tiles")]) == 1
    assert "no column n_unreadable; give the folder that `pathokd embed` wrote)." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "options", "sentence"),
    [
        (["t={m}", "t={m}"], [], "models should have different names, got t, t: write NAME=MODEL."),
        (["{m}", "{m}"], [], "models should have different names"),
        (["a={m}"], ["--out", "{tmp}"], "is a folder: name the file to write"),
        (["a={m}", "b={m}"], ["--fidelity", "a:b"], "--fidelity compares on packed tiles"),
        (
            ["a={m}", "b={m}"],
            ["--fidelity", "a:b:a", "--data", "{tmp}"],
            "--fidelity takes STUDENT:TEACHER out of a, b",
        ),
    ],
)
def test_compare(
    models: list[str], options: list[str], sentence: str, tiny_teacher: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of two models of one name only the last was measured."""
    np.savez(tmp_path / "i.npz", images=np.zeros((10, 32, 32, 3), np.uint8), labels=np.arange(10) % 2)
    words = ["--data", str(tmp_path / "i.npz"), *options]
    filled = [word.format(m=tiny_teacher, tmp=tmp_path) for word in ["compare", *models, *words]]
    assert main(filled) == 1
    assert sentence in capsys.readouterr().err


def test_fidelity_takes_the_head_of_the_teacher_it_names() -> None:
    """Of a student of several teachers the first one's head was taken, whatever teacher was named."""
    heads = ("uni.cls", "uni.cls.statistics", "virchow.cls")
    assert _head_of("virchow", heads) == "virchow"
    assert _head_of("teacher", heads[:2]) == "uni"
    assert _head_of("teacher", ()) is None
    with pytest.raises(ValueError, match="heads for the teachers uni, virchow; call the teacher by one of these"):
        _head_of("teacher", heads)


def test_the_manifest_of_a_tiled_folder_is_the_folder(tiles: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """As for `pack`; it was opened as a slide."""
    manifest = str(tiles / "tiles/manifest.parquet")
    assert main(["embed", str(tiny_teacher), manifest, "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/tiles").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["simulate", "{tiles}/tiles", "--scanner", "pale"],
        ["simulate", "{tiles}/one.tif", "--scanner", "pale"],
        ["compare", "{m}", "--data", "{tiles}/tiles"],
        ["robustness", "{m}", "--pairs", "{tiles}/tiles"],
    ],
)
def test_a_negative_seed(
    words: list[str], tiles: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(tiles=tiles, m=tiny_teacher) for word in words]
    assert main([*filled, "--out", str(tmp_path / "out"), "--seed", "-1"]) == 1
    assert "must not be negative, got -1" in capsys.readouterr().err


def test_a_truncated_slide_is_one_sentence(tiles: Path, tmp_path: Path) -> None:
    """tifffile logged a line for every page it could not find, hundreds of them."""
    (tmp_path / "cut.tif").write_bytes((tiles / "one.tif").read_bytes()[:3000])
    code = "import sys; from pathokd.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "cut.tif")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cannot be tiled" in done.stdout
    assert done.stderr == ""


def test_inspect_takes_the_option_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It told to pass --mpp-level0 and had --mpp only."""
    scan = render(make_scene(3, 420.0, margin_um=40.0, region_um=120.0), "HE", "S50")
    slide = str(write_pyramid(tmp_path / "mute.tif", scan, None))
    assert main(["inspect", slide]) == 1
    assert "--mpp-level0" in capsys.readouterr().out
    assert main(["inspect", slide, "--mpp-level0", "0.5"]) == 0


def test_a_slide_without_its_end_is_called_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scanners write the directory of images last; without it the sentence was "max() arg is an empty sequence"."""
    (tmp_path / "cut.svs").write_bytes(b"II*\0" + (100_000).to_bytes(4, "little") + bytes(5000))
    assert main(["inspect", str(tmp_path / "cut.svs")]) == 1
    assert "holds no image: it is cut off or damaged; copy it again from its source." in capsys.readouterr().out


def test_tiles_do_not_go_where_packed_ones_are(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was tiled there was never read: other verbs took the packed tiles of before."""
    before = sorted(packed.iterdir())
    assert main(["tile", "slide.svs", "--out", str(packed)]) == 1
    assert "holds packed tiles: choose another output folder." in capsys.readouterr().err
    assert sorted(packed.iterdir()) == before
