"""What goes wrong is one sentence, leaves nothing half-written, and the rest of the work is done."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pathokd.cli.main import _dashed, main
from pathokd.phantom import write_pyramid
from pathokd.types import Rgb


def tissue(seed: int = 0) -> Rgb:
    """A pink square with dark grains on white: enough for the tissue mask."""
    rng = np.random.default_rng(seed)
    image = np.full((512, 512, 3), 245, np.uint8)
    grains = rng.integers(-25, 25, (384, 384, 3)) + np.array([190, 110, 170])
    image[64:448, 64:448] = grains.clip(0, 255).astype(np.uint8)
    return image


def said(args: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_pyramid(folder / "good.tif", tissue(), 0.5)
    write_pyramid(folder / "no_mpp.tif", tissue(1), None)
    write_pyramid(folder / "one_bad_tile.tif", tissue(2), 0.5, tile_px=128, corrupt=[(0, 1, 1)], downsamples=(4.0,))
    (folder / "broken.svs").write_bytes(b"II*\0 this was a slide once")
    return folder


def test_bad_slides_are_rows_and_the_good_ones_are_done(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiles"
    code, text = said(["tile", slides, "--out", out, "--tile-px", 128], capsys)
    assert code == 1
    assert "2 of 4 slides failed" in text
    summary = pd.read_csv(out / "summary.csv").set_index("slide_id")
    assert summary["status"].to_dict() == {"broken": "failed", "good": "ok", "no_mpp": "failed", "one_bad_tile": "ok"}
    assert "--mpp-level0" in summary.loc["no_mpp", "message"]
    assert "broken.svs" in summary.loc["broken", "message"]
    assert said(["tile", slides, "--out", out, "--tile-px", 128, "--skip-errors"], capsys)[0] == 0

    code, text = said(["pack", out, "--out", tmp_path / "packed"], capsys)
    assert code == 1
    assert "1 tiles could not be read" in text
    lost = pd.read_csv(tmp_path / "packed/unreadable.csv")
    assert lost["slide_id"].to_list() == ["one_bad_tile"]
    manifest = pd.read_parquet(out / "manifest.parquet")
    assert len(pd.read_parquet(tmp_path / "packed/index.parquet")) == len(manifest) - 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["tile", "{tmp}/empty", "--out", "{tmp}/out"], "No slides in"),
        (["tile", "{tmp}/nowhere", "--out", "{tmp}/out"], "does not exist"),
        (["tile", "{tmp}/empty", "--out", "{tmp}/out", "--min-tissue", "7"], "between 0 and 1, got 7"),
        (["pack", "{tmp}/empty", "--out", "{tmp}/out"], "pathokd tile"),
        (["export", "{tmp}/empty", "--out", "{tmp}/out"], "holds no checkpoints"),
        (["embed", "h0_mnii", "{tmp}/empty", "--out", "{tmp}/out"], "h0_mini"),
        (
            ["embed", "student", "{tmp}/empty", "--out", "{tmp}/out"],
            "There is no folder student here, and no model card",
        ),
        (["compare", "a=h0_mini", "--data", "{tmp}/empty"], "pathokd pack"),
        (["phantom", "{tmp}/out", "--stainings", "[HE,PAS]"], "PAS"),
        (["validate", "--config", "{root}/configs/distill/quickstart.yaml", "--out", "{tmp}/out"], "train first"),
    ],
)
def test_one_sentence_each(args: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    root = Path(__file__).parents[2]
    code, text = said([arg.format(tmp=tmp_path, root=root) for arg in args], capsys)
    assert code == 1
    assert sentence in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_a_typo_is_told_before_anything_is_made(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[2] / "configs/distill/hoptimus0_to_vitb.yaml"
    args = ["fit", "--config", recipe, "--model.teachers.hoptimus0.weights", "hoptimus00", "--out", tmp_path / "run"]
    args += ["--data.tiles", packed, "--data.geometry.size_px", 32, "--data.batch_size", 4, "--data.val_fraction", 0.3]
    code, text = said([*args, "--trainer.accelerator", "cpu", "--trainer.devices", 1], capsys)
    assert code == 1
    assert "hoptimus0" in text
    assert "Traceback" not in text
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_unknown_verb_or_option_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(["tiel"], capsys)
    assert code == 2
    assert "choose from quickstart, inspect, tile" in text
    with pytest.raises(SystemExit) as stop:
        main(["tile", "somewhere", "--out", "x", "--tile-pix", "7"])
    assert stop.value.code == 2
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 300 KiB."""
    mount = shutil.which("mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    slides: Path, tiny_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = tmp_path / "tiles"
    said(["tile", slides / "good.tif", "--out", tiles, "--tile-px", 128, "--stride", 16], capsys)
    code, text = said(["pack", tiles, "--out", tiny_disk / "packed", "--quality", 0], capsys)
    assert code == 1
    assert "No space left on device" in text
    assert "Traceback" not in text
    assert not list(tiny_disk.rglob("*.part"))
    assert not (tiny_disk / "packed/index.parquet").exists()


def test_embedding_onto_a_full_disk_stops_with_one_sentence(
    slides: Path, tiny_disk: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first slide that does not fit ends the run: embedding the others would be for nothing."""
    tiles, out = tmp_path / "tiles", tiny_disk / "out"
    (slides / "second.tif").write_bytes((slides / "good.tif").read_bytes())
    said(["tile", slides / "*d.tif", "--out", tiles, "--tile-px", 64, "--stride", 8], capsys)
    assert len(pd.read_parquet(tiles / "manifest.parquet")) > 4000
    code, text = said(["embed", tiny_teacher, tiles, "--out", out], capsys)
    assert code == 1
    sentences = [line for line in text.splitlines() if line.startswith("pathokd embed:")]
    assert len(sentences) == 1
    assert "No space left on device" in sentences[0]
    assert "good.h5" in sentences[0]
    assert "Traceback" not in text
    assert not list(tiny_disk.rglob("*.part"))
    assert not list(tiny_disk.rglob("*.h5"))
    shutil.rmtree(out)
    assert said(["embed", tiny_teacher, tiles, "--out", tmp_path / "roomy"], capsys)[0] == 0


def test_words_as_a_shell_gives_them() -> None:
    def verb(sources: list[str], *, tile_px: int = 1, stain: list[str] = [], overwrite: bool = False) -> None:  # noqa: B006
        del sources, tile_px, stain, overwrite

    given = ["--tile-px", "224", "a-b.svs", "--overwrite", "--stain", "a,b-c"]
    assert _dashed(given, verb) == ["--tile_px", "224", "a-b.svs", "--overwrite=true", "--stain=[a,b-c]"]
    assert _dashed(["--overwrite", "false", "--stain=[a]", "--tile-px=3"], verb) == [
        "--overwrite=false",
        "--stain=[a]",
        "--tile_px=3",
    ]
    assert _dashed(["--overwrite", "--stain"], verb) == ["--overwrite=true", "--stain=[]"]


def test_what_the_system_refuses_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "list.csv")

    monkeypatch.setattr("pathokd.slides.sources.find_slides", refuse)
    assert said(["tile", tmp_path, "--out", tmp_path / "out"], capsys) == (
        1,
        "pathokd tile: [Errno 13] Permission denied: 'list.csv'\n",
    )
    monkeypatch.setattr("pathokd.slides.sources.find_slides", lambda *args, **kwargs: [][0])
    with pytest.raises(IndexError):  # a defect of the program keeps its traceback
        main(["tile", str(tmp_path), "--out", str(tmp_path / "out")])
