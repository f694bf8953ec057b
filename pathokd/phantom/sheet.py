"""The section being painted: dye concentrations on a fine grid, and where cells stand on it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pathokd.phantom.noise import F32

Points = npt.NDArray[np.float64]
"""Positions in microns, shape (n, 2), columns x and y."""


@dataclass(frozen=True)
class Sheet:
    """Dye concentrations of a section, painted in place.

    A concentration of 1 is the optical density 1 along the dye's unit vector, as displayed; 0 is clear glass.
    `angle` is the local direction of connective-tissue fibres. All arrays are (rows, columns) on one grid.
    """

    mpp: float
    haematoxylin: F32
    eosin: F32
    blood: F32
    angle: F32

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.eosin.shape
        return rows, columns

    def window(self, rows: slice, columns: slice) -> "Sheet":
        """The part of the section under a window; painting it paints this sheet."""
        at = (rows, columns)
        return Sheet(self.mpp, self.haematoxylin[at], self.eosin[at], self.blood[at], self.angle[at])

    def lay(self, weight: F32, *, haematoxylin: F32 | float, eosin: F32 | float, keep_blood: float = 0.0) -> None:
        """Put a tissue over what is there; `weight` in [0, 1] is how much of each pixel it covers."""
        rest = 1.0 - weight
        self.haematoxylin[...] = self.haematoxylin * rest + weight * haematoxylin
        self.eosin[...] = self.eosin * rest + weight * eosin
        self.blood[...] = self.blood * (rest + weight * keep_blood)


class CellField(NamedTuple):
    """For every pixel: distance to the two nearest cells in microns, and the nearest one (`owner`)."""

    first: F32
    second: F32
    owner: npt.NDArray[np.intp]


def lookup(image: F32, points: Points, mpp: float) -> F32:
    """Values of `image` under `points` (microns); points outside take the border's value."""
    rows = np.clip((points[:, 1] / mpp).astype(np.intp), 0, image.shape[0] - 1)
    columns = np.clip((points[:, 0] / mpp).astype(np.intp), 0, image.shape[1] - 1)
    return np.asarray(image[rows, columns], dtype=np.float32)


def scatter(
    rng: np.random.Generator,
    weight: F32,
    mpp: float,
    spacing_um: float,
    *,
    threshold: float = 0.5,
    rounds: int = 8,
) -> Points:
    """Cell positions at least `spacing_um` apart where `weight` exceeds `threshold`.

    Each round throws new darts, drops those near an accepted one, and of two near each other the later one
    (Matern's second thinning); eight rounds come close to the densest random packing.

    Args:
        rng: source of positions.
        weight: (rows, columns) in [0, 1].
        mpp: microns per pixel of `weight`.
        spacing_um: least distance of two cells.
        threshold: least weight under a cell.
        rounds: 1 is sparse and irregular, 8 is dense.

    Returns:
        (n, 2) x and y in microns, from the window's corner.
    """
    height_um, width_um = weight.shape[0] * mpp, weight.shape[1] * mpp
    darts = math.ceil(1.3 * height_um * width_um / spacing_um**2)
    kept: Points = np.empty((0, 2))
    for _ in range(rounds):
        new = rng.uniform((0.0, 0.0), (width_um, height_um), size=(darts, 2))
        new = new[lookup(weight, new, mpp) > threshold]
        if len(kept) and len(new):
            new = new[cKDTree(kept).query(new)[0] >= spacing_um]
        if len(new) > 1:
            pairs = cKDTree(new).query_pairs(spacing_um, output_type="ndarray")
            new = np.delete(new, np.unique(pairs[:, 1]), axis=0)
        kept = np.concatenate([kept, new])
    return kept


def cell_field(points: Points, shape: tuple[int, int], mpp: float, warp: tuple[F32, F32] | None = None) -> CellField:
    """Distances to the two nearest cells, from which cell borders follow (`second - first` is 0 there).

    Args:
        points: (n, 2) cell centres in microns, n >= 2.
        shape: (rows, columns) of the result.
        mpp: microns per pixel.
        warp: optional displacement (x, y) in microns of `shape`, so that borders are not straight.
    """
    step = max(1, round(0.7 / mpp))
    y, x = np.meshgrid(*(np.arange(0, n, step, dtype=np.float64) * mpp for n in shape), indexing="ij")
    if warp is not None:
        x, y = x + warp[0][::step, ::step], y + warp[1][::step, ::step]
    distance, index = cKDTree(points).query(np.stack([x, y], axis=-1), k=2)
    size = (shape[1], shape[0])

    def enlarge(field: npt.NDArray[np.float64]) -> F32:
        return np.asarray(cv2.resize(field.astype(np.float32), size, interpolation=cv2.INTER_LINEAR), dtype=np.float32)

    nearest = cv2.resize(index[..., 0].astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    return CellField(enlarge(distance[..., 0]), enlarge(distance[..., 1]), np.asarray(nearest, dtype=np.intp))
