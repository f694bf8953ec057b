import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathokd.errors import ManifestError
from pathokd.slides import tile_labels
from pathokd.slides.labels import read_label_map


def test_values() -> None:
    # Map pixels of 4 um: left half class 2, right half class 5; level 0 at 0.5 um, so the seam is at x = 80.
    classes = np.full((20, 20), 2, np.uint8)
    classes[:, 10:] = 5
    x, y = np.array([0, 60, 75, 100, 500]), np.zeros(5, int)
    label, share = tile_labels(classes, 4.0, x, y, 0.5, 20.0)
    assert label.tolist() == [2, 2, 5, 5, -1]
    # Tiles are 40 px wide: [60, 100) is half and half (tie: lower index), [75, 115) is 35/40 class 5.
    assert share.tolist() == pytest.approx([1, 0.5, 35 / 40, 1, 0])


def write(folder: Path, classes: np.ndarray, facts: object) -> Path:
    Image.fromarray(classes).save(folder / "map.png")
    (folder / "map.json").write_text(json.dumps(facts))
    return folder / "map.png"


def test_round_trip(tmp_path: Path) -> None:
    classes = np.arange(4, dtype=np.uint8).reshape(2, 2)
    path = write(tmp_path, classes, {"mpp": 4.0, "classes": list("abcd")})
    found = read_label_map(path)
    assert np.array_equal(found.classes, classes)
    assert (found.mpp, found.names) == (4.0, tuple("abcd"))


def test_a_map_too_large_to_open_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, np.zeros((20, 20), np.uint8), {"mpp": 4.0, "classes": ["a"]})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ManifestError, match=r"too large .* coarser mpp"):
        read_label_map(path)


def test_errors(tmp_path: Path) -> None:
    classes = np.arange(4, dtype=np.uint8).reshape(2, 2)
    with pytest.raises(ManifestError, match="names 2 classes"):
        read_label_map(write(tmp_path, classes, {"mpp": 4.0, "classes": ["a", "b"]}))
    with pytest.raises(ManifestError, match="cannot be read"):
        read_label_map(write(tmp_path, classes, {"classes": list("abcd")}))
    with pytest.raises(ManifestError, match="one 8-bit class"):
        read_label_map(write(tmp_path, np.zeros((2, 2, 3), np.uint8), {"mpp": 4.0, "classes": ["a"]}))
    (tmp_path / "map.json").unlink()
    with pytest.raises(ManifestError, match=r"map\.json is missing"):
        read_label_map(tmp_path / "map.png")


@pytest.mark.parametrize("mpp", ["0", "-1", "NaN", "Infinity"])
def test_a_pixel_size_that_cannot_be(tmp_path: Path, mpp: str) -> None:
    """They gave a traceback, or tiles without labels and without a word."""
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "m.png")
    (tmp_path / "m.json").write_text(f'{{"mpp": {mpp}, "classes": ["a"]}}')
    with pytest.raises(ManifestError, match=r"cannot be read \(ValueError: mpp is .*microns per pixel"):
        read_label_map(tmp_path / "m.png")
