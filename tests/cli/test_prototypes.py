"""The verb, twice, and its sentences."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from pathokd.cli.main import main
from pathokd.models.prototype_head import read_header


def test_prototypes_are_made_once(
    packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "prototypes",
        str(tiny_teacher),
        str(packed),
        "--out",
        str(tmp_path / "head"),
        "--k",
        "8",
        "--workers",
        "0",
    ]
    assert main([*words, "--views", "2", "--device", "cpu", "--temperatures", "[0.04,0.07]"]) == 0
    assert "cls: 8 prototypes of 96 tokens" in capsys.readouterr().out
    settings = read_header(tmp_path / "head")["settings"]
    assert (settings["k"], settings["teacher"], settings["temperatures"]) == (8, "tiny", [0.04, 0.07])
    assert main([*words, "--views", "2", "--device", "cpu", "--temperatures", "[0.04,0.07]"]) == 0
    assert main([*words, "--views", "3"]) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*words[:4], str(tmp_path / "few"), "--k", "999"]) == 1
    error = capsys.readouterr().err
    assert "too few for 999 prototypes" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "few").exists()
    assert main([*words[:-4], "--k", "999", "--workers", "0", "--overwrite"]) == 1
    assert "too few for 999 prototypes" in capsys.readouterr().err
    assert read_header(tmp_path / "head")["settings"] == settings  # what was there is kept


def test_a_tile_that_a_worker_cannot_read_is_one_sentence(
    packed: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(packed, tmp_path / "damaged")
    tile = pd.read_parquet(packed / "index.parquet").iloc[5]
    with open(tmp_path / "damaged" / tile["shard"], "r+b") as shard:
        shard.seek(tile["offset"])
        shard.write(bytes(int(tile["size"])))
    words = ["prototypes", str(tiny_teacher), str(tmp_path / "damaged"), "--out", str(tmp_path / "head"), "--k", "8"]
    assert main([*words, "--workers", "1", "--device", "cpu"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"pathokd prototypes: Tile {tile['key']} of ")
    assert error.endswith("is no readable image: the shard is damaged, run `pathokd pack --overwrite`.")
    assert len(error.splitlines()) == 1
