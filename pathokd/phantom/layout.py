"""Where each tissue lies: an outline on glass, divided into smooth regions of equal area, one class each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathokd.phantom.noise import F32, smooth_noise
from pathokd.types import Microns

CLASSES = ("background", "stroma", "glands", "tumour", "necrosis", "fat", "lymphocytes")
"""Names of the classes; a class map holds indices into this tuple."""
BACKGROUND, STROMA, GLANDS, TUMOUR, NECROSIS, FAT, LYMPHOCYTES = range(7)
MAP_MPP = 2.0
"""Microns per pixel of class maps inside a scene."""

ClassMap = npt.NDArray[np.uint8]
"""Indices into `CLASSES`, shape (rows, columns)."""


class Region(NamedTuple):
    """A connected piece of one class and its padded bounding window, in class-map pixels."""

    label: int
    rows: slice
    columns: slice
    mask: npt.NDArray[np.bool_]


def make_layout(rng: np.random.Generator, size_um: Microns, margin_um: Microns, region_um: Microns) -> ClassMap:
    """Class map of a section: one piece of tissue on white glass.

    Regions are cells of a power diagram whose weights are adjusted until all cells have the same area, so
    classes are balanced; coordinates are warped by noise first, so borders are smooth and no two cases are
    alike.

    Args:
        rng: source of the layout.
        size_um: side of the square field.
        margin_um: mean width of the glass around the tissue.
        region_um: side of a region, about; classes take turns over the regions.

    Returns:
        Class map at `MAP_MPP`, square, `round(size_um / MAP_MPP)` pixels a side.
    """
    side = round(size_um / MAP_MPP)
    tissue = outline(rng, side, margin_um / MAP_MPP)
    amount = 0.09 * region_um / MAP_MPP
    y, x = np.indices((side, side), dtype=np.float32)
    for part, width in ((1.0, 0.45), (0.22, 0.1)):
        x = x + part * amount * smooth_noise(rng, (side, side), width * region_um / MAP_MPP)
        y = y + part * amount * smooth_noise(rng, (side, side), width * region_um / MAP_MPP)
    kinds = len(CLASSES) - 1
    count = kinds * max(1, round(float(tissue.sum()) * MAP_MPP**2 / region_um**2 / kinds))
    cells = balanced_cells(rng, np.stack([x, y], axis=-1), tissue, count)
    labels = _deal(rng, count)
    return np.where(tissue, labels[cells], BACKGROUND).astype(np.uint8)


def outline(rng: np.random.Generator, side: int, margin: float) -> npt.NDArray[np.bool_]:
    """A rounded, slightly ragged piece that fills a square of `side` pixels up to about `margin`."""
    y, x = np.indices((side, side), dtype=np.float32)
    half = side / 2
    u, v = (x + 0.5 - half) / (half - margin), (y + 0.5 - half) / (half - margin)
    radius = (np.abs(u) ** 4.0 + np.abs(v) ** 4.0) ** 0.25
    ragged = 0.03 * smooth_noise(rng, (side, side), side / 4) + 0.006 * smooth_noise(rng, (side, side), 14.0)
    ragged = np.maximum(ragged, -0.8 * margin / half)  # never over the rim of the glass
    piece = (radius + ragged < 1.0).astype(np.uint8)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(piece)
    if count < 2:
        return np.asarray(piece, dtype=np.bool_)
    return np.asarray(parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), dtype=np.bool_)


def balanced_cells(
    rng: np.random.Generator, xy: F32, inside: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.intp]:
    """Divide `inside` into `count` compact cells of nearly equal area.

    A power diagram under Lloyd's iteration: sites move to their cell's centroid while the weight of a cell
    that is too small rises.

    Reference: Aurenhammer, Hoffmann and Aronov 1998, "Minkowski-type theorems and least-squares clustering".

    Args:
        rng: source of the first sites.
        xy: (rows, columns, 2) coordinates of each pixel.
        inside: (rows, columns) pixels to divide.
        count: number of cells.

    Returns:
        (rows, columns) index of the cell of every pixel, also outside.
    """
    sample = xy[inside][:: max(1, int(inside.sum()) // 20_000)]
    sites = sample[rng.choice(len(sample), count, replace=False)].astype(np.float64)
    weights = np.zeros(count)
    target = 1.0 / count
    area_px = inside.sum() / count
    for step in range(150):
        owner = np.argmin(_power(sample, sites, weights), axis=1)
        share = np.bincount(owner, minlength=count) / len(sample)
        if step < 100:
            for i in np.flatnonzero(share):
                sites[i] += 0.5 * (sample[owner == i].mean(axis=0) - sites[i])
        weights += 0.3 * area_px * (target - share) / target
    return np.asarray(np.stack([np.argmin(_power(row, sites, weights), axis=1) for row in xy]), dtype=np.intp)


def _power(xy: F32, sites: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Power distance of points (n, 2) to every site, shape (n, count)."""
    gaps = xy[:, None, :].astype(np.float64) - sites[None]
    return np.asarray((gaps**2).sum(axis=-1) - weights)


def _deal(rng: np.random.Generator, count: int) -> npt.NDArray[np.intp]:
    """A tissue class for each of `count` cells; every class comes before any comes again."""
    rounds = [1 + rng.permutation(len(CLASSES) - 1) for _ in range(math.ceil(count / (len(CLASSES) - 1)))]
    return np.asarray(rng.permutation(np.concatenate(rounds)[:count]), dtype=np.intp)


def regions(class_map: ClassMap, label: int, pad_um: Microns = 14.0) -> Sequence[Region]:
    """The connected pieces of one class, largest window first, each with a padded window for painting."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats((class_map == label).astype(np.uint8))
    pad = round(pad_um / MAP_MPP)
    found = []
    for i in range(1, count):
        x, y, w, h = (int(stats[i, k]) for k in range(4))
        rows = slice(max(0, y - pad), min(class_map.shape[0], y + h + pad))
        columns = slice(max(0, x - pad), min(class_map.shape[1], x + w + pad))
        found.append(Region(label, rows, columns, np.asarray(parts[rows, columns] == i)))
    return sorted(found, key=lambda region: -int(region.mask.sum()))
