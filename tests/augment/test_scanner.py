"""Scanner profiles: identity at 0, monotone, stored and read back, drawn at random, named errors."""

import itertools
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import yaml

from pathokd.augment.scanner import PROFILES, ScannerProfile, ScannerSwap, get_profile
from pathokd.errors import StoreError
from pathokd.types import Rgb


def distance(a: Rgb, b: Rgb) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("name", list(PROFILES))
def test_severity(name: str, tissue: Rgb, odd_tile: Rgb) -> None:
    profile, before = PROFILES[name], tissue.copy()
    for image in (tissue, odd_tile):
        assert np.array_equal(profile.apply(image, severity=0.0), image)
    steps = [distance(profile.apply(tissue, severity=s), tissue) for s in (0, 0.25, 0.5, 0.75, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert np.array_equal(tissue, before)
    assert profile.apply(odd_tile).shape == odd_tile.shape


def test_an_empty_profile_is_the_identity(tissue: Rgb, every_value: Rgb) -> None:
    for image in (tissue, every_value):
        assert np.array_equal(ScannerProfile("none").apply(image), image)


@pytest.mark.parametrize("name", list(PROFILES))
def test_stored_and_read_back(name: str, tmp_path: Path, tissue: Rgb) -> None:
    PROFILES[name].save(tmp_path / "profile.yaml")
    found = get_profile(str(tmp_path / "profile.yaml"))
    assert found == PROFILES[name]
    assert ScannerProfile.from_dict(found.to_dict()) == found
    assert np.array_equal(found.apply(tissue, seed=3), PROFILES[name].apply(tissue, seed=3))


def test_noise_follows_the_seed(tissue: Rgb) -> None:
    profile = PROFILES["grey-noisy"]
    assert np.array_equal(profile.apply(tissue, seed=1), profile.apply(tissue, seed=1))
    assert not np.array_equal(profile.apply(tissue, seed=1), profile.apply(tissue, seed=2))


def test_swap(tissue: Rgb, odd_tile: Rgb) -> None:
    one = A.Compose([ScannerSwap()], seed=1)
    images = [one(image=tissue)["image"].tobytes() for _ in range(6)]
    assert len(set(images)) == 6
    two: Any = A.from_dict(A.to_dict(one))
    two.set_random_seed(1)
    assert two(image=tissue)["image"].tobytes() == images[0]
    assert np.array_equal(ScannerSwap(severity=(0, 0))(image=tissue)["image"], tissue)
    assert ScannerSwap()(image=odd_tile)["image"].shape == odd_tile.shape


def test_wrong_profiles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scanner profile 'soft_warm': did you mean soft-warm"):
        get_profile("soft_warm")
    with pytest.raises(ValueError, match=r"no scanner profile 'zzz': choose from .* or give a YAML file\.$"):
        get_profile("zzz")
    with pytest.raises(ValueError, match="jpeg_quality must lie in 1 to 100"):
        ScannerProfile("x", jpeg_quality=0)
    with pytest.raises(ValueError, match="blur_px must not be negative"):
        ScannerProfile("x", blur_px=-1)
    (tmp_path / "other.yaml").write_text("schema: other")
    with pytest.raises(StoreError, match="should hold profile of schema"):
        get_profile(str(tmp_path / "other.yaml"))
    with pytest.raises(StoreError, match="cannot be read"):
        get_profile(str(tmp_path / "none.yaml"))


def written(folder: Path, **changes: Any) -> str:
    """A profile as a person edits it; None leaves a field out."""
    PROFILES["pale"].save(folder / "profile.yaml")
    found = yaml.safe_load((folder / "profile.yaml").read_text(encoding="utf-8"))
    found["profile"] = {key: value for key, value in {**found["profile"], **changes}.items() if value is not None}
    (folder / "profile.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    return str(folder / "profile.yaml")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"blurr_px": 1.0}, "no field 'blurr_px'"),
        ({"name": None}, "name is missing"),
        ({"blur_px": "wide"}, "blur_px must hold finite numbers"),
        ({"blur_px": float("nan")}, "blur_px must hold finite numbers"),
        ({"od_offset": [0.0, float("nan"), 0.0]}, "od_offset must hold finite numbers"),
        ({"od_matrix": [[1, 0, 0], [0, 1, 0], [0, 0, "x"]]}, "od_matrix must hold finite numbers"),
        ({"chromatic_px": [float("inf"), 0.0]}, "chromatic_px must hold finite numbers"),
        ({"od_matrix": 3}, "not iterable"),
        ({"chromatic_px": [1.0]}, "two numbers"),
        ({"read": -1.0}, "read must not be negative"),
    ],
)
def test_a_file_edited_wrongly_is_one_sentence(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"describes no scanner profile: .*{why}"):
        get_profile(written(tmp_path, **change))


def test_what_a_file_leaves_out_has_no_effect(tmp_path: Path, tissue: Rgb) -> None:
    nothing = dict.fromkeys(("od_matrix", "od_offset", "shot", "jpeg_quality", "chromatic_px"))
    profile = get_profile(written(tmp_path, **nothing))
    assert profile == ScannerProfile("pale", profile.source, blur_px=0.4)
