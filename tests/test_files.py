"""Atomic writes: whose trouble an error is."""

import errno
from pathlib import Path

import pytest

from pathokd.errors import StoreError
from pathokd.files import atomic_path


def test_an_input_that_cannot_be_read_is_not_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """A slide without permission was "Cannot write shard: free some space"."""
    target = tmp_path / "out.bin"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"), atomic_path(target):
        (tmp_path / "folder").read_bytes()
    with pytest.raises(PermissionError), atomic_path(target):
        raise PermissionError(errno.EACCES, "Permission denied", "slide.svs")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_output_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "below" / "out.bin", tmp_path):
        with pytest.raises(StoreError, match="Cannot write"), atomic_path(target) as part:
            part.write_bytes(b"x")
    with pytest.raises(StoreError, match=r"out\.bin: No space left"), atomic_path(tmp_path / "out.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StoreError, match="Cannot write"), atomic_path(tmp_path / "out.bin") as part:
        raise PermissionError(errno.EACCES, "Permission denied", str(part))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    """It said "File exists. Free some space"."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target, what in (("file/out.bin", "file is a file, not a folder"), ("folder", "folder is a folder")):
        caught = pytest.raises(StoreError, match=f"{what}; name another output")
        with caught as error, atomic_path(tmp_path / target) as part:
            part.write_bytes(b"x")
        assert "space" not in str(error.value)
