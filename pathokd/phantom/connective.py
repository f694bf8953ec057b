"""Stroma with collagen, fibroblasts and vessels, and fat."""

import math

import cv2
import numpy as np

from pathokd.phantom.noise import F32, curl, fibre_noise, noise_tile, smooth_noise, smoothstep
from pathokd.phantom.nuclei import ENDOTHELIUM, FIBROBLAST, LYMPHOCYTE, PLASMA_CELL, discs, stamp
from pathokd.phantom.sheet import Points, Sheet, cell_field, lookup, scatter


def paint_collagen(sheet: Sheet, rng: np.random.Generator) -> None:
    """Fill the whole sheet with interwoven eosinophilic bundles; every other tissue is laid over it."""
    tile = noise_tile(rng, 1.5)
    weave = smooth_noise(rng, sheet.shape, 75.0 / sheet.mpp)
    layers = [curl(rng, sheet.shape, sheet.mpp, sway) for sway in (45.0, 30.0)]
    first = smoothstep(weave, -0.42, -0.08)
    bundles, strands, fibrils = (
        first * fibre_noise(tile, layers[0], *size) + (1 - first) * fibre_noise(tile, layers[1], *size)
        for size in ((110.0, 14.0, 0.0), (42.0, 3.4, 101.0), (15.0, 1.35, 203.0))
    )
    sheet.angle[...] = np.where(first > 0.5, layers[0].angle, layers[1].angle)
    seam = smoothstep(np.abs(weave + 0.25), 0.12, 0.0)
    loose = smooth_noise(rng, sheet.shape, 90.0 / sheet.mpp)
    lumpy = smooth_noise(rng, sheet.shape, 6.0 / sheet.mpp)
    grain = smooth_noise(rng, sheet.shape, 1.7 / sheet.mpp)
    eosin = 0.33 + 0.03 * bundles + 0.05 * strands + 0.035 * fibrils + 0.02 * lumpy + 0.02 * grain - 0.035 * loose
    gaps = 0.6 * bundles + 0.55 * strands + 0.3 * fibrils + 0.3 * lumpy + 0.5 * loose + 0.3 * seam
    clefts = smoothstep(gaps, 1.2, 1.85)
    sheet.eosin[...] = np.maximum(eosin, 0.08) * (1.0 - 0.85 * clefts)
    sheet.haematoxylin[...] = np.maximum(0.06 + 0.015 * bundles + 0.012 * fibrils, 0.01) * (1.0 - 0.7 * clefts)


def along_fibres(sheet: Sheet, rng: np.random.Generator, points: Points, jitter: float = 0.18) -> F32:
    """Directions of cells that lie along the fibres under them."""
    found = lookup(sheet.angle, points, sheet.mpp)
    return found + np.asarray(jitter * rng.standard_normal(len(points)), dtype=np.float32)


def paint_stroma(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """Fibroblasts in uneven density, a few inflammatory cells, and small vessels with red cells."""
    for _ in range(max(1, round(float(weight.sum()) * sheet.mpp**2 / 22_000))):
        _paint_vessel(sheet, weight, rng)
    crowd = smooth_noise(rng, sheet.shape, 110.0 / sheet.mpp)
    free = weight * (sheet.blood < 0.05) * (sheet.eosin > 0.12)
    for spacing, low in ((19.0, -9.0), (11.0, 0.55)):
        at = scatter(rng, free * (crowd > low), sheet.mpp, spacing, rounds=4)
        stamp(sheet, rng, FIBROBLAST, at, along_fibres(sheet, rng, at))
    strays = scatter(rng, free, sheet.mpp, 42.0, rounds=2)
    stamp(sheet, rng, LYMPHOCYTE, strays[::2])
    stamp(sheet, rng, PLASMA_CELL, strays[1::2])


def _paint_vessel(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """One capillary or venule: endothelium around a lumen that holds red cells or nothing."""
    spots = scatter(rng, weight, sheet.mpp, 40.0, threshold=0.98, rounds=1)
    if not len(spots):
        return
    x0, y0 = spots[int(rng.integers(len(spots)))]
    theta = float(lookup(sheet.angle, np.array([[x0, y0]]), sheet.mpp)[0])
    short = float(rng.uniform(4.5, 11.0))
    long = short * float(rng.uniform(1.2, 3.0))
    filled = rng.random() < 0.65
    phase = rng.uniform(0, 2 * math.pi, 2)

    def frame(points: Points) -> tuple[Points, Points]:
        dx, dy = points[..., 0] - x0, points[..., 1] - y0
        return dx * math.cos(theta) + dy * math.sin(theta), dy * math.cos(theta) - dx * math.sin(theta)

    reach = long + 8.0
    rows = slice(max(0, int((y0 - reach) / sheet.mpp)), int((y0 + reach) / sheet.mpp))
    columns = slice(max(0, int((x0 - reach) / sheet.mpp)), int((x0 + reach) / sheet.mpp))
    part = sheet.window(rows, columns)
    y, x = np.indices(part.shape, dtype=np.float64)
    u, v = frame(np.stack([(x + columns.start) * sheet.mpp, (y + rows.start) * sheet.mpp], axis=-1))
    phi = np.arctan2(v / short, u / long)
    rim = 1 + 0.14 * np.cos(2 * phi + phase[0]) + 0.1 * np.cos(3 * phi + phase[1]) + 0.06 * np.cos(5 * phi)
    depth = ((rim - np.hypot(u / long, v / short)) * short).astype(np.float32)
    part.lay(0.7 * smoothstep(depth, -3.6, -1.2), haematoxylin=0.07, eosin=0.36)
    part.lay(smoothstep(depth, -0.4, 0.4), haematoxylin=0.01, eosin=0.03)
    ring = np.arange(0, 2 * math.pi, 11.0 / (short + long)) + phase[0]
    ring = ring + 0.25 * rng.standard_normal(len(ring))
    lx, ly = (long + 1.2) * np.cos(ring), (short + 1.2) * np.sin(ring)
    at = np.stack(
        [x0 + lx * math.cos(theta) - ly * math.sin(theta), y0 + lx * math.sin(theta) + ly * math.cos(theta)],
        1,
    )
    tangent = np.arctan2(short * np.cos(ring), -long * np.sin(ring)) + theta
    stamp(sheet, rng, ENDOTHELIUM, at, tangent.astype(np.float32))
    if filled:
        inside = smoothstep(depth, 1.0, 2.5)
        cells = scatter(rng, inside, sheet.mpp, 4.3)
        discs(part, rng, cells, 3.3, 0.36)


def paint_fat(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """Adipocytes: large clear cells with thin membranes, flat nuclei, and capillaries where three meet."""
    centres = scatter(rng, np.ones_like(weight), sheet.mpp, float(rng.uniform(36.0, 46.0)), rounds=5)
    if len(centres) < 3:
        centres = rng.uniform(0, min(sheet.shape) * sheet.mpp, (3, 2))
    warp = tuple(4.0 * smooth_noise(rng, sheet.shape, 45.0 / sheet.mpp) for _ in range(2))
    cells = cell_field(centres, sheet.shape, sheet.mpp, (warp[0], warp[1]))
    soft = 2.5  # blurring the distance to the border rounds the cells off where three meet
    gap = np.asarray(cv2.GaussianBlur(cells.second - cells.first, (0, 0), soft / sheet.mpp), dtype=np.float32)
    gap = gap - np.float32(1.6 * soft)  # 0 on a straight border
    thick = 0.55 + 0.4 * smooth_noise(rng, sheet.shape, 30.0 / sheet.mpp)
    thick = thick + 4.0 * smoothstep(smooth_noise(rng, sheet.shape, 75.0 / sheet.mpp), 1.1, 2.4)
    inner = gap - np.maximum(thick, 0.35)  # 0 at the face of a cell, negative between cells
    between = smoothstep(inner, 0.5, -0.5)
    face = np.exp(-((inner / 0.9) ** 2)).astype(np.float32)
    stain = 1.0 + 0.3 * smooth_noise(rng, sheet.shape, 14.0 / sheet.mpp)
    stain = stain + 0.25 * smooth_noise(rng, sheet.shape, 2.2 / sheet.mpp)
    eosin = np.maximum((0.15 * face + 0.13 * between) * stain, 0.0) + 0.01
    sheet.lay(weight, haematoxylin=np.asarray(0.2 * eosin, dtype=np.float32), eosin=np.asarray(eosin, np.float32))
    at = scatter(rng, weight * (inner < -0.15), sheet.mpp, 24.0, rounds=3)
    gy, gx = np.gradient(gap)
    stamp(sheet, rng, FIBROBLAST, at, lookup(np.arctan2(gx, -gy), at, sheet.mpp))
    knots = scatter(rng, weight * smoothstep(inner, -2.0, -3.0), sheet.mpp, 5.5, rounds=2)
    discs(sheet, rng, knots[::3], 3.0, 0.36)
    stamp(sheet, rng, ENDOTHELIUM, knots[1::3])
