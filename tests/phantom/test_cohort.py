import csv
import json
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from pathokd.errors import StoreError
from pathokd.files import sha256_file
from pathokd.phantom import CLASSES, write_cohort

SMALL = {"cases": 2, "size_um": 200.0, "margin_um": 12.0, "region_um": 70.0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), **SMALL)


def rows(cohort: Path) -> list[dict[str, str]]:
    with open(cohort, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_slide_list_and_slides(cohort: Path) -> None:
    found = rows(cohort)
    assert list(found[0]) == ["slide_id", "path", "case", "stain", "scanner", "label_map"]
    assert len({row["slide_id"] for row in found}) == len(found) == 8
    for row in found:
        with openslide.OpenSlide(cohort.parent / row["path"]) as slide:
            mpp = float(slide.properties["openslide.mpp-x"])
            assert mpp == pytest.approx({"S50": 0.5, "S45": 0.4545}[row["scanner"]])
            assert slide.dimensions[0] == int(200 / mpp)


def test_class_maps_lie_beside_the_slides(cohort: Path) -> None:
    for row in rows(cohort):
        path = cohort.parent / row["label_map"]
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar == {"mpp": 4.0, "classes": list(CLASSES)}
        labels = np.asarray(Image.open(path))
        assert labels.shape == (50, 50)
        assert set(np.unique(labels)) == set(range(len(CLASSES)))


def test_class_map_lies_on_the_tissue(cohort: Path) -> None:
    """Glass in the map is glass on the slide, and the classes crowded with nuclei are its darkest."""
    for row in rows(cohort):
        labels = np.asarray(Image.open(cohort.parent / row["label_map"]))
        with openslide.OpenSlide(cohort.parent / row["path"]) as slide:
            image = slide.get_thumbnail((50, 50)).convert("L").resize((50, 50))
        grey = np.asarray(image).astype(float)
        means = [grey[labels == i].mean() for i in range(len(CLASSES))]
        assert int(np.argmax(means)) == CLASSES.index("background")
        dark = {CLASSES.index("lymphocytes"), CLASSES.index("tumour")}
        assert set(np.argsort(means)[:2].tolist()) == dark


def test_resume_writes_only_what_is_missing_and_the_same_bytes(cohort: Path) -> None:
    folder = cohort.parent
    before = {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in folder.glob("*.tif")}
    lost = folder / rows(cohort)[1]["path"]
    lost.unlink()
    write_cohort(folder, **SMALL)
    after = {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in folder.glob("*.tif")}
    assert {name for name in before if before[name][1] != after[name][1]} == {lost.name}
    assert {name: pair[0] for name, pair in before.items()} == {name: pair[0] for name, pair in after.items()}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_other_settings_are_refused_by_name(cohort: Path) -> None:
    with pytest.raises(StoreError, match="seed = 0"):
        write_cohort(cohort.parent, **SMALL, seed=3)


def test_overwrite_accepts_other_settings(tmp_path: Path) -> None:
    few = {**SMALL, "cases": 1, "stainings": ("HE",), "scanners": ("S50",)}
    first = sha256_file(write_cohort(tmp_path, **few).parent / "case01_HE_S50.tif")
    write_cohort(tmp_path, **few, seed=3, overwrite=True)
    assert sha256_file(tmp_path / "case01_HE_S50.tif") != first


def test_overwriting_that_was_stopped_resumes_without_mixing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {**SMALL, "cases": 1, "stainings": ("HE",), "scanners": ("S50",)}
    slide = write_cohort(tmp_path, **few).parent / "case01_HE_S50.tif"
    first = sha256_file(slide)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathokd.phantom.cohort.make_scene", stop)
        with pytest.raises(KeyboardInterrupt):
            write_cohort(tmp_path, **few, seed=3, overwrite=True)
    assert not slide.exists()
    write_cohort(tmp_path, **few, seed=3)
    assert sha256_file(slide) != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": 0}, "at least one of each"),
        ({"scanners": ()}, "at least one of each"),
        ({"stainings": ("HE", "HE")}, "named once"),
        ({"stainings": ("PAS",)}, "staining must be one of"),
        ({"scanners": ("X",)}, "scanner must be one of"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_cohort(tmp_path, **{**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_shipped_cohort_matches_the_code() -> None:
    """tile_data holds what the code lists: every slide and class map, under 12 MB."""
    folder = Path(__file__).parents[2] / "tile_data" / "phantom"
    found = rows(folder / "slides.csv")
    assert len(found) == 16
    assert all((folder / row["path"]).is_file() and (folder / row["label_map"]).is_file() for row in found)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_um": -3.0}, "size_um must be at least 60"),
        ({"seed": -1}, "seed must not be negative"),
        ({"quality": 0}, "quality must lie in 1..100, got 0 and 0"),
        ({"tile_px": 100}, "tile_px must be a multiple of 16, got 100"),
        ({"scene_mpp": 3.0}, "mpp of the dye maps must lie in 0.1 to 1"),
        ({"region_um": 0.0}, "region_um must be above 0"),
    ],
)
def test_a_run_that_cannot_be_claims_no_folder(tmp_path: Path, changes: dict, message: str) -> None:
    """The next run, with its mistake mended, was refused; with overwrite the old slides were gone."""
    with pytest.raises(ValueError, match=message):
        write_cohort(tmp_path, **{**SMALL, **changes})
    assert not list(tmp_path.iterdir())
