"""Fixtures that every floor shares."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slides and tiles, named by PATHOKD_REAL_DATA (`.ci/run` sets it); skips the test without it."""
    folder = os.environ.get("PATHOKD_REAL_DATA")
    if not folder:
        pytest.skip("needs real slides: set PATHOKD_REAL_DATA to a copy of shared/data")
    path = Path(folder)
    if not (path / "README.md").is_file():
        pytest.fail(f"PATHOKD_REAL_DATA={folder} holds no README.md: it should be a copy of shared/data")
    return path
