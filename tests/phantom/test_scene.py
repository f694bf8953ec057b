import numpy as np
import pytest

from pathokd.phantom import CLASSES, Scene, make_scene, render
from pathokd.phantom.layout import FAT, LYMPHOCYTES, MAP_MPP, NECROSIS, balanced_cells, make_layout, regions


def test_same_seed_same_bits(scene: Scene) -> None:
    again = make_scene(7, 240.0, margin_um=15.0, region_um=80.0)
    for name in ("class_map", "haematoxylin", "eosin", "blood"):
        np.testing.assert_array_equal(getattr(scene, name), getattr(again, name))
    np.testing.assert_array_equal(render(scene, "HE", "S45"), render(again, "HE", "S45"))


def test_other_seed_other_tissue(scene: Scene) -> None:
    other = make_scene(8, 240.0, margin_um=15.0, region_um=80.0)
    assert np.mean(other.class_map != scene.class_map) > 0.2


def test_dyes_are_plausible(scene: Scene) -> None:
    for dye in (scene.haematoxylin, scene.eosin, scene.blood):
        assert dye.shape == (750, 750)
        assert dye.dtype == np.float32
        assert np.isfinite(dye).all()
        assert dye.min() >= 0
        assert dye.max() < 3.5
    label = scene.label_map(scene.mpp)
    mean = {name: float(scene.haematoxylin[label == i].mean()) for i, name in enumerate(CLASSES)}
    assert mean["background"] < 0.02
    assert mean["fat"] < mean["stroma"] < mean["tumour"] < mean["lymphocytes"]


@pytest.mark.parametrize("seed", range(4))
def test_layout_holds_every_class_in_equal_parts(seed: int) -> None:
    class_map = make_layout(np.random.default_rng(seed), 1060.0, 25.0, 280.0)
    share = np.bincount(class_map.ravel(), minlength=len(CLASSES)) / class_map.size
    assert class_map.shape == (530, 530)
    assert share[0] > 0.08
    np.testing.assert_allclose(share[1:] / share[1:].mean(), 1.0, atol=0.06)


def test_balanced_cells_have_equal_area_and_cover_all() -> None:
    y, x = np.indices((80, 100), dtype=np.float32)
    inside = (x - 50) ** 2 / 45**2 + (y - 40) ** 2 / 35**2 < 1
    cells = balanced_cells(np.random.default_rng(3), np.stack([x, y], -1), inside, 7)
    area = np.bincount(cells[inside], minlength=7)
    assert area.sum() == inside.sum()
    np.testing.assert_allclose(area / area.mean(), 1.0, atol=0.06)


def test_regions_cover_a_class_once() -> None:
    class_map = make_layout(np.random.default_rng(5), 600.0, 20.0, 150.0)
    painted = np.zeros(class_map.shape, int)
    for region in regions(class_map, FAT):
        painted[region.rows, region.columns] += region.mask
    np.testing.assert_array_equal(painted, class_map == FAT)


def test_label_map_at_another_resolution(scene: Scene) -> None:
    coarse = scene.label_map(4.0)
    assert coarse.shape == (60, 60)
    # The centre of a 4 um pixel is a corner of four 2 um pixels: the lower right one is taken.
    np.testing.assert_array_equal(coarse, scene.class_map[1::2, 1::2])
    np.testing.assert_array_equal(scene.label_map(MAP_MPP), scene.class_map)


def test_own_class_map() -> None:
    drawn = np.full((50, 50), NECROSIS, np.uint8)
    drawn[:, 25:] = LYMPHOCYTES
    own = make_scene(1, 100.0, margin_um=0.0, class_map=drawn)
    half = own.haematoxylin.shape[1] // 2
    assert own.haematoxylin[:, half + 20 :].mean() > 2 * own.haematoxylin[:, : half - 20].mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_um": 20.0}, "size_um must be at least 60"),
        ({"margin_um": 90.0}, "margin_um under a third"),
        ({"mpp": 3.0}, "must lie in 0.1 to 1"),
        ({"class_map": np.zeros((3, 3), np.uint8)}, "class_map must be 100 x 100"),
        ({"class_map": np.full((100, 100), 9, np.uint8)}, "maximum 9"),
    ],
)
def test_impossible_scenes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(**{"seed": 0, "size_um": 200.0, "margin_um": 10.0, **changes})
