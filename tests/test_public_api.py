"""Importing is cheap, public names resolve, and help needs no Lightning."""

import subprocess
import sys

import pytest

import pathokd

TIMES = 3


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_no_heavy_package() -> None:
    heavy = "torch timm lightning albumentations pandas openslide".split()  # noqa: SIM905
    loaded = run(f"import sys, pathokd; print([name for name in {heavy!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_every_public_name_resolves() -> None:
    assert len(pathokd.__all__) <= 18
    for name in pathokd.__all__:
        assert getattr(pathokd, name) is not None
    with pytest.raises(AttributeError, match="public names: DistillationModule"):
        pathokd.nonsense  # noqa: B018


@pytest.mark.parametrize("args", [["--help"], ["tile", "--help"], ["pack", "--help"], ["inspect", "--help"]])
def test_help_needs_no_lightning(args: list[str]) -> None:
    code = (
        "import sys\nfrom pathokd.cli.main import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(); print([name for name in ('torch', 'lightning', 'timm') if name in sys.modules])"
    )
    out = run(code)
    assert out.splitlines()[-1] == "[]"
    assert "usage: pathokd" in out
