"""Views share their geometry, differ in their photometric part, and never repeat a stream."""

import itertools
from typing import Any

import albumentations as A
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathokd.data.batch import Draw
from pathokd.data.views import Geometry, Views, crop_box, d4, dino_crops
from pathokd.types import Rgb


@pytest.fixture
def tile() -> Rgb:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def jitter() -> list[A.BasicTransform]:
    return [A.RandomBrightnessContrast(p=1.0)]


def test_the_eight_symmetries_are_distinct_and_form_a_group(tile: Rgb) -> None:
    images = [d4(tile, element) for element in range(8)]
    assert len({image.tobytes() for image in images}) == 8
    products = {d4(image, element).tobytes() for image, element in itertools.product(images, range(8))}
    assert products == {image.tobytes() for image in images}


@given(side=st.integers(1, 300), low=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_crops_lie_inside_the_tile(side: int, low: float, seed: int) -> None:
    left, top, crop = crop_box(side, (low, 1.0), np.random.default_rng(seed))
    assert 1 <= crop <= side
    assert 0 <= left <= side - crop
    assert 0 <= top <= side - crop


def test_the_whole_tile_unturned_is_the_identity(tile: Rgb) -> None:
    views = Views(Geometry(32, d4=False))(tile, Draw(0, 0))
    assert np.array_equal(views["clean"], tile)


def test_views_share_geometry(tile: Rgb) -> None:
    # An invertible photometric change: undoing it must give the clean view back, pixel for pixel.
    views = Views(Geometry(16, (0.3, 1.0)), {"inverted": [A.InvertImg(p=1.0)]}, seed=1)
    for index in range(20):
        drawn = views(tile, Draw(index, 3))
        assert np.array_equal(255 - drawn["inverted"], drawn["clean"])


def test_a_draw_repeats_exactly_and_other_draws_differ(tile: Rgb) -> None:
    views = Views(Geometry(32), {"student": jitter()}, seed=5)
    draws = [Draw(index, epoch) for index in range(6) for epoch in range(6)]
    first = [views(tile, draw)["student"].tobytes() for draw in draws]
    again = [
        Views(Geometry(32), {"student": jitter()}, seed=5)(tile, draw)["student"].tobytes() for draw in reversed(draws)
    ]
    assert first == again[::-1]
    assert len(set(first)) == len(draws)


def test_the_clean_view_takes_no_photometric_change() -> None:
    with pytest.raises(ValueError, match="clean"):
        Views(Geometry(32), {"clean": jitter()})


@pytest.mark.parametrize("wrong", [{"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}, {"scale": (0.5, 1.5)}, {"size_px": 0}])
def test_impossible_geometry_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        Geometry(**wrong)  # type: ignore[arg-type]


def test_further_crops_have_their_own_geometry(tile: Rgb) -> None:
    crops = {"local": Geometry(8, (0.05, 0.3), count=3), "global2": Geometry(16, (0.3, 1.0))}
    views = Views(Geometry(16), {"local/student": [A.InvertImg(p=1.0)], "student": jitter()}, crops, seed=2)
    assert views.names == ("clean", "local", "global2", "local/student", "student")
    drawn = views(tile, Draw(3, 1))
    assert {name: image.shape for name, image in drawn.items()} == {
        "clean": (16, 16, 3),
        "student": (16, 16, 3),
        "global2": (16, 16, 3),
        "local": (3, 8, 8, 3),
        "local/student": (3, 8, 8, 3),
    }
    assert np.array_equal(255 - drawn["local/student"], drawn["local"])
    assert len({crop.tobytes() for crop in drawn["local"]}) == 3
    assert not np.array_equal(drawn["global2"], drawn["clean"])


def test_further_crops_do_not_change_the_shared_one(tile: Rgb) -> None:
    alone = Views(Geometry(16, (0.3, 1.0)), seed=2)(tile, Draw(3, 1))["clean"]
    beside = Views(Geometry(16, (0.3, 1.0)), crops=dino_crops(2), seed=2)(tile, Draw(3, 1))["clean"]
    assert np.array_equal(alone, beside)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((Geometry(16, count=2), {}, {}), "shared crop is drawn once"),
        ((Geometry(16), {"local/student": jitter()}, {}), "crop that data.crops does not name; it names none"),
        ((Geometry(16), {"clean": jitter()}, {}), "'clean' takes no photometric"),
        ((Geometry(16), {"local": jitter()}, {"local": Geometry(8)}), "'local' takes no photometric"),
    ],
)
def test_wrong_views_are_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Views(*arguments)
