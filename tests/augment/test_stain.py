"""Staining transforms: nothing at zero, more with strength, glass kept, streams of their own, written and read back."""

import itertools
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import yaml
from PIL import Image

from pathokd.augment.stain import HEDJitter, RandStainNA, StainJitter, StainSwap, swap_stain
from pathokd.augment.stain_basis import measure_appearance
from pathokd.augment.stain_math import GLASS_OD, to_od
from pathokd.augment.stainings import STAININGS, get_staining
from pathokd.augment.statistics import StainStatistics, fit_statistics
from pathokd.errors import StoreError
from pathokd.types import Rgb


@pytest.fixture(scope="module")
def statistics_file(tmp_path_factory: pytest.TempPathFactory, tissue: Rgb) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.yaml"
    slides = [[swap_stain(tissue, measure_appearance(tissue), get_staining(name))] for name in ("cmu-1", "histoqc-2")]
    fit_statistics(slides).save(path, "two stainings of one phantom")
    return path


def transforms(statistics: Path) -> dict[str, A.BasicTransform]:
    return {
        "jitter": StainJitter(),
        "macenko": StainJitter(basis="macenko"),
        "hed": HEDJitter(),
        "swap": StainSwap(),
        "known source": StainSwap(["histoqc-1"], source="cmu-1"),
        "rand": RandStainNA(str(statistics)),
    }


NAMES = ("jitter", "macenko", "hed", "swap", "known source", "rand")


@pytest.mark.parametrize("name", NAMES)
def test_changes_tissue_and_keeps_glass(name: str, tissue: Rgb, statistics_file: Path) -> None:
    before, glass = tissue.copy(), to_od(tissue).mean(axis=2) < GLASS_OD[0] - 1e-4
    pipeline = A.Compose([transforms(statistics_file)[name]], seed=3)
    images = [pipeline(image=tissue)["image"] for _ in range(5)]
    assert np.array_equal(tissue, before)
    for image in images:
        assert image.dtype == np.uint8
        assert image.shape == tissue.shape
        assert np.array_equal(image[glass], tissue[glass])
        assert np.abs(image.astype(int) - tissue)[~glass].mean() > 0.3
    assert not all(np.array_equal(images[0], other) for other in images[1:])


@pytest.mark.parametrize(
    "transform",
    [
        StainJitter((1, 1), (0, 0)),
        StainJitter((1, 1), (0, 0), basis="macenko"),
        HEDJitter((1, 1), (0, 0)),
        StainSwap(strength=(0, 0)),
    ],
)
def test_nothing_at_zero(transform: A.BasicTransform, tissue: Rgb, every_value: Rgb, odd_tile: Rgb) -> None:
    for image in (tissue, every_value, odd_tile):
        assert np.array_equal(transform(image=image)["image"], image)


def test_rand_stain_na_at_zero(tissue: Rgb, statistics_file: Path) -> None:
    transform = RandStainNA(str(statistics_file), strength=(0, 0))
    assert np.array_equal(transform(image=tissue)["image"], tissue)


def distance(a: Rgb, b: Rgb) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("name", list(STAININGS))
def test_swap_grows_with_strength(name: str, tissue: Rgb) -> None:
    source = measure_appearance(tissue)
    steps = [distance(swap_stain(tissue, source, get_staining(name), s), tissue) for s in (0, 0.25, 0.5, 0.75, 1.0)]
    assert steps[0] == 0
    assert all(a < b for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_jitter_grows_with_scale(factor: float, tissue: Rgb) -> None:
    scales = [1 + (factor - 1) * s for s in (0, 0.25, 0.5, 0.75, 1.0)]
    steps = [distance(StainJitter((s, s), (0, 0))(image=tissue)["image"], tissue) for s in scales]
    assert steps[0] == 0
    assert all(a < b for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("name", NAMES)
def test_odd_tiles_do_not_break(name: str, odd_tile: Rgb, statistics_file: Path) -> None:
    result = transforms(statistics_file)[name](image=odd_tile)["image"]
    assert result.shape == odd_tile.shape
    assert result.dtype == np.uint8


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_back(name: str, tissue: Rgb, statistics_file: Path) -> None:
    first = A.Compose([transforms(statistics_file)[name]], seed=7)
    second: Any = A.from_dict(A.to_dict(first))
    second.set_random_seed(7)
    first.set_random_seed(7)
    for _ in range(3):
        assert np.array_equal(first(image=tissue)["image"], second(image=tissue)["image"])


def test_seeds_decide(tissue: Rgb) -> None:
    streams = [A.Compose([StainJitter()], seed=seed) for seed in (1, 1, 2)]
    a, b, c = ([pipeline(image=tissue)["image"] for _ in range(3)] for pipeline in streams)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_an_image_as_target(tissue: Rgb, tmp_path: Path) -> None:
    reference = swap_stain(tissue, measure_appearance(tissue), get_staining("birl-kidney"))
    Image.fromarray(reference).save(tmp_path / "reference.png")
    swapped = StainSwap([str(tmp_path / "reference.png")], (1, 1))(image=tissue)["image"]
    assert distance(swapped, reference) < 0.2 * distance(tissue, reference)


def test_statistics_of_a_cohort(statistics_file: Path, tissue: Rgb, tmp_path: Path) -> None:
    found = StainStatistics.load(statistics_file)
    assert found.slides == 2
    assert found.mean_sd[0] > 0.02
    found.save(tmp_path / "again.yaml")
    assert StainStatistics.load(tmp_path / "again.yaml") == found
    # Without spread every tile gets the cohort's mean amounts.
    transform = RandStainNA(str(statistics_file), spread=0.0)
    one, two = (transform(image=image)["image"] for image in (tissue, StainJitter((1.3, 1.3))(image=tissue)["image"]))
    assert distance(one, two) < 0.35 * distance(tissue, StainJitter((1.3, 1.3))(image=tissue)["image"])


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: StainJitter((1.2, 0.8)), r"scale must be a range \[low, high\]"),
        (lambda: StainJitter((0.0, 1.0)), "scale must be above 0"),
        (lambda: StainJitter(basis="vahadane"), "basis must be reference or macenko"),  # type: ignore[arg-type]
        (lambda: StainSwap(["cmu1"]), "no staining 'cmu1': did you mean cmu-1"),
        (lambda: StainSwap(["zzz"]), r"no staining 'zzz': choose from .*\.$"),
        (lambda: StainSwap(strength=(0, 2)), "strength must lie within 0 to 1"),
        (lambda: fit_statistics([]), "at least two slides"),
    ],
)
def test_wrong_arguments(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_wrong_files(tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
    with pytest.raises(ValueError, match="cannot serve as a reference of staining: too little tissue"):
        StainSwap([str(tmp_path / "white.png")])
    with pytest.raises(StoreError, match="There is no image"):
        StainSwap([str(tmp_path / "none.png")])
    (tmp_path / "wrong.yaml").write_text("a: 1")
    with pytest.raises(StoreError, match="should hold statistics of schema"):
        RandStainNA(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sd": None}, "sd"),
        ({"median": [1, 1, 1]}, "median"),
        ({"mean": [1.0, 2.0]}, "three finite numbers"),
        ({"mean": [float("nan"), 1.0, 1.0]}, "three finite numbers"),
        ({"mean": ["a", "b", "c"]}, "three finite numbers"),
        ({"sd": [0.1, float("nan"), 0.1]}, "three finite numbers"),
        ({"sd_sd": [-1.0, 0.0, 0.0]}, "negative"),
    ],
)
def test_statistics_edited_wrongly_are_one_sentence(
    change: dict[str, Any], why: str, statistics_file: Path, tmp_path: Path
) -> None:
    found = yaml.safe_load(statistics_file.read_text(encoding="utf-8"))
    fields = {**found["statistics"], **change}
    found["statistics"] = {key: value for key, value in fields.items() if value is not None}
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    with pytest.raises(StoreError, match=f"holds no statistics of stain .*{why}"):
        RandStainNA(str(tmp_path / "edited.yaml"))


@pytest.mark.parametrize("wrong", [{"strength": (0.0, 3.0)}, {"spread": -1.0}])
def test_rand_stain_na_refuses_what_is_out_of_range(wrong: dict[str, Any], statistics_file: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandStainNA(str(statistics_file), **wrong)
