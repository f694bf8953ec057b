"""Nuclei: kinds as data, and the stamp that paints one with membrane, chromatin and nucleoli."""

import math
from dataclasses import dataclass

import numpy as np

from pathokd.phantom.noise import F32, noise_tile, smoothstep
from pathokd.phantom.sheet import Points, Sheet


@dataclass(frozen=True)
class NucleusKind:
    """What nuclei of one cell type look like.

    Lengths are microns, densities haematoxylin concentrations.

    Attributes:
        radius_um: radius of the circle of equal area.
        spread: its log-normal deviation.
        aspect: bounds of long over short axis.
        density: bounds of the concentration that the next three are parts of.
        lump: relative depth of dents in the outline.
        body: even part of the density.
        chromatin: deviation of the clumped part.
        grain_um: size of the clumps.
        membrane: extra density along the rim.
        nucleoli: mean number of nucleoli.
        edge_um: half width of the soft rim in the best focus.
    """

    radius_um: float
    spread: float
    aspect: tuple[float, float]
    density: tuple[float, float]
    lump: float = 0.05
    body: float = 0.75
    chromatin: float = 0.15
    grain_um: float = 0.5
    membrane: float = 0.25
    nucleoli: float = 0.0
    edge_um: float = 0.45


FIBROBLAST = NucleusKind(2.9, 0.22, (2.0, 5.0), (0.42, 0.85), lump=0.09, membrane=0.12)
ENDOTHELIUM = NucleusKind(2.6, 0.18, (2.2, 4.5), (0.55, 0.9), lump=0.08, membrane=0.12)
LYMPHOCYTE = NucleusKind(
    2.95, 0.12, (1.0, 1.3), (0.9, 1.25), lump=0.06, body=0.85, chromatin=0.14, grain_um=0.8, membrane=0.1
)
CENTROCYTE = NucleusKind(
    4.0,
    0.17,
    (1.0, 1.6),
    (0.5, 0.8),
    lump=0.1,
    body=0.65,
    chromatin=0.15,
    grain_um=0.7,
    membrane=0.28,
    nucleoli=0.8,
)
PLASMA_CELL = NucleusKind(2.8, 0.1, (1.0, 1.3), (0.8, 1.1), body=0.75, chromatin=0.25, grain_um=1.0, membrane=0.18)
COLUMNAR = NucleusKind(
    3.1,
    0.15,
    (1.4, 2.5),
    (0.58, 0.92),
    lump=0.07,
    body=0.74,
    chromatin=0.12,
    grain_um=0.6,
    membrane=0.2,
    nucleoli=0.3,
)
TUMOUR = NucleusKind(
    4.5,
    0.25,
    (1.05, 1.8),
    (0.45, 0.95),
    lump=0.11,
    body=0.62,
    chromatin=0.15,
    grain_um=0.65,
    membrane=0.3,
    nucleoli=1.2,
)
GHOST = NucleusKind(4.0, 0.2, (1.0, 1.5), (0.06, 0.2), lump=0.08, body=0.9, chromatin=0.2, membrane=0.0, edge_um=1.4)
PYKNOTIC = NucleusKind(1.7, 0.3, (1.0, 1.7), (0.9, 1.4), lump=0.12, body=0.95, chromatin=0.05, membrane=0.0)
DUST = NucleusKind(0.65, 0.4, (1.0, 1.6), (0.5, 1.2), lump=0.1, body=1.0, chromatin=0.0, membrane=0.0, edge_um=0.4)
MITOSIS = NucleusKind(
    3.0, 0.2, (1.6, 3.2), (1.15, 1.45), lump=0.22, body=0.95, chromatin=0.3, grain_um=0.6, membrane=0.0
)


def stamp(
    sheet: Sheet,
    rng: np.random.Generator,
    kind: NucleusKind,
    centres: Points,
    angles: F32 | None = None,
    *,
    gain: F32 | float = 1.0,
) -> None:
    """Paint nuclei of one kind on the sheet.

    Where two overlap the section is thicker in nuclei, so the darker one wins and a third of the other adds
    to it; eosin under a nucleus is partly displaced.

    Args:
        sheet: painted in place.
        rng: source of sizes, shapes and chromatin.
        kind: the nuclei.
        centres: (n, 2) x, y in microns from the sheet's corner.
        angles: (n,) direction of the long axis in radians; random without it.
        gain: factor on the density, one for all or (n,).
    """
    n = len(centres)
    radius = kind.radius_um * np.exp(kind.spread * rng.standard_normal(n).clip(-2.2, 2.2))
    root = np.sqrt(rng.uniform(*kind.aspect, n))
    density = rng.uniform(*kind.density, n) * gain
    theta = rng.uniform(0, math.pi, n) if angles is None else angles
    waves = kind.lump * rng.standard_normal((n, 3)) / np.array([1.0, 1.3, 1.7])
    phases = rng.uniform(0, 2 * math.pi, (n, 3))
    offsets = rng.integers(0, 384, (n, 2))
    counts = np.minimum(rng.poisson(kind.nucleoli, n), 3)
    spots = rng.uniform(-0.55, 0.55, (n, 3, 2))
    focus = kind.edge_um * rng.uniform(0.8, 2.0, n)  # nuclei lie at different depths in the section
    tile = noise_tile(rng, max(0.7, kind.grain_um / sheet.mpp / 2.0))
    for i in range(n):
        long, short = float(radius[i] * root[i]), float(radius[i] / root[i])
        reach = long * (1 + 2 * kind.lump) + 2 * kind.edge_um + 1.0
        box = _box(sheet, centres[i], reach)
        if box is None:
            continue
        rows, columns, x, y = box
        c, s = math.cos(float(theta[i])), math.sin(float(theta[i]))
        u, v = (x * c + y * s) / long, (y * c - x * s) / short
        phi = np.arctan2(v, u)
        outline = 1.0 + sum(waves[i, k] * np.cos((k + 2) * phi + phases[i, k]) for k in range(3))
        depth = (outline - np.hypot(u, v)) * short  # microns inside the outline, near enough
        body = smoothstep(depth, -float(focus[i]), float(focus[i]))
        part = (np.arange(size) + start for size, start in zip(depth.shape, offsets[i], strict=True))
        clumps = tile[np.ix_(*(where % len(tile) for where in part))]  # the tile is periodic
        h = body * (kind.body + kind.chromatin * clumps)
        if kind.membrane:
            h = h + kind.membrane * np.exp(-(((depth - 0.45) / (0.25 + focus[i] / 2)) ** 2))
        for a, b in spots[i, : counts[i]]:
            h = h + 0.55 * body * np.exp(-(((u - a) * long) ** 2 + ((v - b) * short) ** 2) / 0.7)
        _add(sheet, rows, columns, np.maximum(h, 0.0) * density[i], body)


def _box(sheet: Sheet, centre: Points, reach: float) -> tuple[slice, slice, F32, F32] | None:
    """The window around a centre, clipped to the sheet, with offsets from the centre in microns."""
    x0, y0 = (max(0, math.floor((float(q) - reach) / sheet.mpp)) for q in centre)
    x1 = min(sheet.shape[1], math.ceil((float(centre[0]) + reach) / sheet.mpp))
    y1 = min(sheet.shape[0], math.ceil((float(centre[1]) + reach) / sheet.mpp))
    if x1 <= x0 or y1 <= y0:
        return None
    x = ((np.arange(x0, x1) + 0.5) * sheet.mpp - float(centre[0])).astype(np.float32)[None, :]
    y = ((np.arange(y0, y1) + 0.5) * sheet.mpp - float(centre[1])).astype(np.float32)[:, None]
    return slice(y0, y1), slice(x0, x1), x, y


def _add(sheet: Sheet, rows: slice, columns: slice, h: F32, body: F32) -> None:
    """Lay one nucleus into the window."""
    under = sheet.haematoxylin[rows, columns]
    sheet.haematoxylin[rows, columns] = np.maximum(under, h) + 0.35 * np.minimum(under, h)
    sheet.eosin[rows, columns] *= 1.0 - 0.25 * body


def discs(sheet: Sheet, rng: np.random.Generator, centres: Points, radius_um: float, density: float) -> None:
    """Red blood cells: flat discs with a paler middle, painted into the blood dye."""
    radius = radius_um * np.exp(0.08 * rng.standard_normal(len(centres)))
    strength = density * rng.uniform(0.8, 1.15, len(centres))
    squash = rng.uniform(0.0, 0.25, (len(centres), 2))
    for i, centre in enumerate(centres):
        box = _box(sheet, centre, float(radius[i]) * 1.4 + 1.0)
        if box is None:
            continue
        rows, columns, x, y = box
        u, v = x * (1 + squash[i, 0]), y * (1 + squash[i, 1])
        rho = np.hypot(u + 0.3 * squash[i, 1] * v, v)
        disc = smoothstep(rho, float(radius[i]) + 0.4, float(radius[i]) - 0.4)
        disc *= strength[i] * (1.0 - 0.25 * np.exp(-((rho / (0.5 * radius[i])) ** 2)))
        sheet.blood[rows, columns] = np.maximum(sheet.blood[rows, columns], disc)
        sheet.eosin[rows, columns] *= 1.0 - 0.8 * np.minimum(disc * 3, 1)
