"""Numbers, devices and paths that `cache`, `prototypes` and `denoise` cannot work with: one sentence each."""

from pathlib import Path

import pytest

from pathokd.cli.main import main


@pytest.mark.parametrize(
    ("verb", "options", "sentence"),
    [
        ("cache", ["--view-px", "0"], "view_px must be at least 1, got 0"),
        ("cache", ["--view-px", "-3"], "view_px must be at least 1, got -3"),
        ("cache", ["--image-px", "0"], "image_px must be at least 1"),
        ("cache", ["--batch-size", "0"], "should be at least 1, got 2 and 0"),
        ("cache", ["--batch-size", "-1"], "should be at least 1, got 2 and -1"),
        ("cache", ["--device", "banana"], "device must be auto, cpu, cuda, cuda:N or mps, got 'banana'"),
        ("cache", ["--device", "cuda:99"], "device cuda:99 was asked for"),
        ("prototypes", ["--k-patches", "0"], "at least 2 and iterations at least 1, got 8, 0"),
        ("prototypes", ["--max-tiles", "0"], "must be at least 1, got 1, 16 and 0"),
        ("prototypes", ["--batch-size", "0"], "batch_size must be at least 1"),
        ("prototypes", ["--seed", "-1"], "seed must not be negative, got -1"),
        ("prototypes", ["--scale", "2,3"], "got (2.0, 3.0)"),
        ("prototypes", ["--temperatures", "0"], "temperatures"),
        ("denoise", ["--batch-size", "0"], "batch_size must be at least 1"),
        ("denoise", ["--workers", "-1"], "workers at least 0, got 32 and -1"),
        ("denoise", ["--seed", "-1"], "seed must not be negative, got -1"),
    ],
)
def test_it_is_one_sentence(
    verb: str, options: list[str], sentence: str, packed: Path, registered_packed: Path, tiny_teacher: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tiles = registered_packed if verb == "denoise" else packed
    size = ["--k", "8"] if verb == "prototypes" else []
    assert main([verb, str(tiny_teacher), str(tiles), "--out", str(tmp_path / "out"), *size, *options]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["cache", "prototypes"])
def test_a_file_is_no_folder(
    verb: str, packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    size = ["--k", "8", "--workers", "0"] if verb == "prototypes" else []
    assert main([verb, str(tiny_teacher), str(packed), "--out", str(tmp_path / "out"), *size]) == 1
    assert "out is a file, not a folder; name another output." in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("verb", ["denoise", "stain-stats"])
def test_a_folder_is_no_file(
    verb: str, registered_packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was said after the teacher had seen every place."""
    (tmp_path / "out").mkdir()
    models = [str(tiny_teacher)] if verb == "denoise" else []
    assert main([verb, *models, str(registered_packed), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "out is a folder: name the file to write" in told
    assert "Comparing places" not in told


def test_overwrite_leaves_what_is_not_of_the_targets(packed: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.npy").write_text("mine")
    words = ["cache", str(tiny_teacher), str(packed), "--out", str(tmp_path)]
    assert main([*words, "--dtype", "int8"]) == 0
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "notes.npy").read_text() == "mine"
    assert not (tmp_path / "cls_scale.npy").exists()
