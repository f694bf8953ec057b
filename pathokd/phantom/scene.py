"""A piece of tissue: what lies where, and how much dye it takes up."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from pathokd.phantom import layout
from pathokd.phantom.connective import paint_collagen, paint_fat, paint_stroma
from pathokd.phantom.epithelium import paint_glands, paint_tumour
from pathokd.phantom.infiltrate import paint_lymphocytes, paint_necrosis
from pathokd.phantom.noise import F32, smooth_noise, smoothstep
from pathokd.phantom.nuclei import LYMPHOCYTE, stamp
from pathokd.phantom.sheet import Sheet, lookup, scatter
from pathokd.types import Microns, Mpp

Painter = Callable[[Sheet, F32, np.random.Generator], None]

PAINTERS: dict[int, Painter] = {
    layout.STROMA: paint_stroma,
    layout.NECROSIS: paint_necrosis,
    layout.TUMOUR: paint_tumour,
    layout.GLANDS: paint_glands,
    layout.LYMPHOCYTES: paint_lymphocytes,
    layout.FAT: paint_fat,
}


@dataclass(frozen=True, eq=False)
class Scene:
    """A section before staining and scanning, with its ground truth.

    The same scene under any staining and scanner shows the same structures at the same microns: position (x,
    y) in microns is the same point in every rendering, with pixel (0, 0) spanning [0, mpp) in both
    directions.

    Attributes:
        seed: the number everything in it follows from.
        size_um: side of the square field.
        mpp: microns per pixel of the dye maps.
        class_map: indices into `layout.CLASSES` at `layout.MAP_MPP`.
        haematoxylin: dye concentration, 1 is a display optical density of 1 along the dye's vector.
        eosin: likewise.
        blood: likewise, haemoglobin of red cells.
    """

    seed: int
    size_um: Microns
    mpp: Mpp
    class_map: layout.ClassMap
    haematoxylin: F32
    eosin: F32
    blood: F32

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class map's indices."""
        return layout.CLASSES

    def label_map(self, mpp: Mpp) -> layout.ClassMap:
        """The class map at another resolution (nearest neighbour)."""
        side = round(self.size_um / mpp)
        at = np.minimum(((np.arange(side) + 0.5) * mpp / layout.MAP_MPP).astype(np.intp), len(self.class_map) - 1)
        return np.ascontiguousarray(self.class_map[np.ix_(at, at)])


def check_size(size_um: Microns, margin_um: Microns, region_um: Microns, mpp: Mpp) -> None:
    """Raise ValueError for a field, regions or dye maps that cannot hold tissue."""
    if size_um < 60 or not 0 <= margin_um < size_um / 3:
        raise ValueError(
            f"size_um must be at least 60 and margin_um under a third of it, got {size_um} and {margin_um}: "
            "enlarge the field or narrow the margin."
        )
    if not region_um > 0:
        raise ValueError(f"region_um must be above 0, got {region_um}: 320 is the default.")
    if not 0.1 <= mpp <= 1.0:
        raise ValueError(f"mpp of the dye maps must lie in 0.1 to 1 um/px, got {mpp}: 0.25 to 0.35 suits 20x scanners.")


def make_scene(
    seed: int,
    size_um: Microns = 1300.0,
    *,
    margin_um: Microns = 100.0,
    region_um: Microns = 320.0,
    mpp: Mpp = 0.32,
    class_map: layout.ClassMap | None = None,
) -> Scene:
    """Grow a piece of tissue from a seed.

    Args:
        seed: same seed, same scene, bit by bit (on one machine and one set of library versions).
        size_um: side of the square field, at least 60.
        margin_um: mean width of the glass around the tissue.
        region_um: side of a tissue region, about; small regions put many classes into a small field.
        mpp: microns per pixel of the dye maps, 0.1 to 1; finer than any scanner that will look at it.
        class_map: a layout of your own instead of a drawn one, at `layout.MAP_MPP`, square,
            `round(size_um / MAP_MPP)` a side.

    Raises:
        ValueError: a size, margin or resolution that cannot hold tissue, or a class map of the wrong shape.
    """
    check_size(size_um, margin_um, region_um, mpp)
    side = round(size_um / layout.MAP_MPP)
    if class_map is None:
        class_map = layout.make_layout(np.random.default_rng([seed, 1]), size_um, margin_um, region_um)
    elif class_map.shape != (side, side) or int(class_map.max()) >= len(layout.CLASSES):
        raise ValueError(
            f"class_map must be {side} x {side} with indices under {len(layout.CLASSES)}, got shape "
            f"{class_map.shape} with maximum {int(class_map.max())}: draw it at {layout.MAP_MPP} um/px."
        )
    sheet = _paint(seed, class_map, size_um, mpp)
    return Scene(seed, size_um, mpp, class_map, sheet.haematoxylin, sheet.eosin, sheet.blood)


def _paint(seed: int, class_map: layout.ClassMap, size_um: Microns, mpp: Mpp) -> Sheet:
    """Collagen everywhere, the other tissues over it, then thickness and the edge of the section."""
    side = round(size_um / mpp)
    shape = (side, side)
    rng = np.random.default_rng([seed, 2])
    empty = (np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    sheet = Sheet(mpp, *empty, np.zeros(shape, np.float32))
    paint_collagen(sheet, rng)
    for label, painter in PAINTERS.items():
        for number, region in enumerate(layout.regions(class_map, label)):
            child = np.random.default_rng([seed, 3, label, number])
            rows, columns = (_finer(part, mpp, side) for part in (region.rows, region.columns))
            part = sheet.window(rows, columns)
            weight = _soften(region, rows, columns, mpp)
            painter(part, weight, child)
    _spill(sheet, class_map, np.random.default_rng([seed, 5]))
    _finish(sheet, class_map, np.random.default_rng([seed, 4]))
    return sheet


def _spill(sheet: Sheet, class_map: layout.ClassMap, rng: np.random.Generator) -> None:
    """Lymphocytes that have wandered out of their region into the tissue around it, fewer with distance."""
    outside = (class_map != layout.LYMPHOCYTES).astype(np.uint8)
    open_to_them = np.isin(class_map, (layout.STROMA, layout.GLANDS, layout.TUMOUR))
    away_um = cv2.distanceTransform(outside, cv2.DIST_L2, 5) * layout.MAP_MPP
    near = np.asarray(np.exp(-away_um / 18.0) * open_to_them, dtype=np.float32)
    at = scatter(rng, near, layout.MAP_MPP, 7.0, threshold=0.04, rounds=4)
    stay = (rng.random(len(at)) < lookup(near, at, layout.MAP_MPP)) & (lookup(sheet.eosin, at, sheet.mpp) > 0.08)
    stamp(sheet, rng, LYMPHOCYTE, at[stay])


def _finer(part: slice, mpp: Mpp, side: int) -> slice:
    return slice(round(part.start * layout.MAP_MPP / mpp), min(side, round(part.stop * layout.MAP_MPP / mpp)))


def _soften(region: layout.Region, rows: slice, columns: slice, mpp: Mpp) -> F32:
    """A region's mask on the fine grid with smooth borders."""
    blurred = cv2.GaussianBlur(region.mask.astype(np.float32), (0, 0), 1.6)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    enlarged = cv2.resize(blurred, size, interpolation=cv2.INTER_LINEAR)
    return smoothstep(np.asarray(enlarged, dtype=np.float32), 0.38, 0.62)


def _finish(sheet: Sheet, class_map: layout.ClassMap, rng: np.random.Generator) -> None:
    """Cut the section out of the glass, with uneven thickness and a few specks."""
    tissue = cv2.GaussianBlur((class_map != layout.BACKGROUND).astype(np.float32), (0, 0), 1.2)
    tissue = cv2.resize(tissue, sheet.shape[::-1], interpolation=cv2.INTER_LINEAR)
    fray = 0.1 * smooth_noise(rng, sheet.shape, 4.0 / sheet.mpp)
    cut = smoothstep(np.asarray(tissue, dtype=np.float32) + fray, 0.42, 0.58)
    thick = 1.0 + 0.09 * smooth_noise(rng, sheet.shape, 260.0 / sheet.mpp)
    thick += 0.03 * smooth_noise(rng, sheet.shape, 40.0 / sheet.mpp)
    for dye in (sheet.haematoxylin, sheet.eosin, sheet.blood):
        dye *= cut * np.clip(thick, 0.6, 1.4)
        np.maximum(dye, 0.0, out=dye)
