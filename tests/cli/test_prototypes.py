"""The verb, twice, and its sentences."""

from pathlib import Path

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
