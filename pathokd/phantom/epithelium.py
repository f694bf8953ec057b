"""Epithelium: glands with a lumen and palisaded nuclei, and nests of tumour."""

import math

import numpy as np
from scipy.spatial import cKDTree

from pathokd.phantom.connective import along_fibres
from pathokd.phantom.noise import F32, smooth_noise, smoothstep
from pathokd.phantom.nuclei import (
    COLUMNAR,
    FIBROBLAST,
    LYMPHOCYTE,
    MITOSIS,
    PLASMA_CELL,
    PYKNOTIC,
    TUMOUR,
    stamp,
)
from pathokd.phantom.sheet import Points, Sheet, cell_field, lookup, scatter


def paint_glands(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """Crypts side by side in loose lamina propria full of plasma cells and lymphocytes."""
    loose = 0.17 + 0.07 * smooth_noise(rng, sheet.shape, 6.0 / sheet.mpp)
    loose = np.maximum(loose + 0.045 * smooth_noise(rng, sheet.shape, 1.8 / sheet.mpp), 0.02)
    sheet.lay(0.75 * weight, haematoxylin=0.05, eosin=loose, keep_blood=1.0)
    spacing = float(rng.uniform(58.0, 70.0))
    centres = scatter(rng, weight, sheet.mpp, spacing, rounds=14)
    near = cKDTree(centres).query(centres, k=2)[0][:, 1] if len(centres) > 1 else np.full(len(centres), spacing)
    taken = np.zeros_like(weight)
    slant = float(rng.uniform(0, math.pi))
    for centre, free_um in zip(centres, near, strict=True):
        room = 0.5 * min(float(free_um), 1.3 * spacing) * float(rng.uniform(0.84, 1.0))
        _paint_gland(sheet, weight, taken, rng, centre, room, slant)
    free = weight * (taken < 0.05)
    at = scatter(rng, free, sheet.mpp, 7.6, rounds=4)
    kind = rng.random(len(at))
    stamp(sheet, rng, PLASMA_CELL, at[kind < 0.35])
    stamp(sheet, rng, LYMPHOCYTE, at[(kind >= 0.35) & (kind < 0.6)])
    spindles = at[kind >= 0.72]
    stamp(sheet, rng, FIBROBLAST, spindles, along_fibres(sheet, rng, spindles))


def _paint_gland(
    sheet: Sheet,
    weight: F32,
    taken: F32,
    rng: np.random.Generator,
    centre: Points,
    room_um: float,
    slant: float,
) -> None:
    """One gland: basal nuclei, pale mucous cytoplasm with goblet vacuoles, apical border, lumen."""
    aspect = float(rng.uniform(1.0, 1.45))
    long, short = room_um * math.sqrt(aspect), room_um / math.sqrt(aspect)
    theta = slant + 0.4 * float(rng.standard_normal())
    amp, phase = 0.05 * rng.standard_normal(4), rng.uniform(0, 2 * math.pi, 4)

    def radius(phi: Points) -> Points:
        base = 1.0 / np.sqrt((np.cos(phi) / long) ** 2 + (np.sin(phi) / short) ** 2)
        return np.asarray(base * (1 + sum(amp[k] * np.cos((k + 2) * phi + phase[k]) for k in range(4))))

    reach = 1.35 * long + 3.0
    x0, y0 = float(centre[0]), float(centre[1])
    rows = slice(max(0, int((y0 - reach) / sheet.mpp)), max(1, int((y0 + reach) / sheet.mpp)))
    columns = slice(max(0, int((x0 - reach) / sheet.mpp)), max(1, int((x0 + reach) / sheet.mpp)))
    part, cover = sheet.window(rows, columns), taken[rows, columns]
    y, x = np.indices(part.shape, dtype=np.float64)
    x, y = (x + columns.start + 0.5) * sheet.mpp - x0, (y + rows.start + 0.5) * sheet.mpp - y0
    phi = np.arctan2(y, x) - theta
    depth = (radius(phi) - np.hypot(x, y)).astype(np.float32)
    height = min(float(rng.uniform(18.0, 26.0)), 0.72 * short)
    wobble = 1.2 * smooth_noise(rng, part.shape, 8.0 / sheet.mpp)
    cell = _paint_cytoplasm(part, weight[rows, columns], rng, phi, depth + 0.0, height, wobble, room_um)
    cover[...] = np.maximum(cover, smoothstep(depth, -3.0, -1.5))
    step = 4.3 / room_um
    ring = np.arange(0, 2 * math.pi, step)
    ring = ring + 0.22 * step * rng.standard_normal(len(ring))
    deep = 5.2 + 1.7 * rng.standard_normal(len(ring)).clip(-1.6, 2.2) + cell
    rho = radius(ring) - deep
    at = np.stack([x0 + rho * np.cos(ring + theta), y0 + rho * np.sin(ring + theta)], axis=1)
    fine = lookup(weight, at, sheet.mpp) > 0.4
    tilt = ring + theta + 0.14 * rng.standard_normal(len(ring))
    stamp(sheet, rng, COLUMNAR, at[fine], tilt[fine].astype(np.float32))


def _paint_cytoplasm(
    part: Sheet,
    weight: F32,
    rng: np.random.Generator,
    phi: Points,
    depth: F32,
    height: float,
    wobble: F32,
    room_um: float,
) -> float:
    """Cells between basal membrane and lumen; returns how much deeper than usual the nuclei stand."""
    cells = max(8, round(2 * math.pi * (room_um - 8) / 6.5))
    turn = (phi / (2 * math.pi)) % 1.0 * cells
    index = turn.astype(np.intp) % cells
    goblet = rng.random(cells) < float(rng.uniform(0.4, 0.8))
    middle = 12.5 + 2.0 * rng.standard_normal(cells)
    size = rng.uniform(4.0, 6.2, cells)
    across = (turn % 1.0 - 0.5) * 6.5 * np.maximum(room_um - depth, 4.0) / room_um
    vacuole = np.hypot(across / 0.72, (depth - middle[index]) * 0.8) - size[index]
    mucin = smoothstep(vacuole.astype(np.float32) + 0.4 * wobble, 0.6, -0.9) * goblet[index]
    border = np.exp(-(((np.abs(turn % 1.0 - 0.5) - 0.5) * 6.5 / 0.55) ** 2)).astype(np.float32)
    grain = 1.0 + 0.16 * smooth_noise(rng, part.shape, 1.6 / part.mpp)
    eosin = (0.2 + 0.05 * border + 0.05 * smoothstep(depth, height - 4, height)) * grain * (1 - 0.8 * mucin)
    haematoxylin = (0.13 - 0.05 * smoothstep(depth, 5.0, 14.0)) * (1 - mucin) + 0.075 * mucin * grain
    fit = weight * smoothstep(depth, -0.6, 0.6)
    membrane = weight * np.exp(-(((depth + 0.8) / 0.9) ** 2)).astype(np.float32)
    part.lay(0.6 * membrane, haematoxylin=0.07, eosin=0.42)
    part.lay(fit, haematoxylin=haematoxylin, eosin=eosin)
    lumen = fit * smoothstep(depth + wobble, height - 0.7, height + 0.7)
    wisps = smoothstep(smooth_noise(rng, part.shape, 7.0 / part.mpp), 0.6, 2.4)
    part.lay(lumen, haematoxylin=0.015 + 0.07 * wisps, eosin=0.015 + 0.03 * wisps)
    return float(rng.uniform(-0.5, 1.2))


def paint_tumour(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """Solid nests of large pleomorphic cells with mitoses and dying cells, in thin desmoplastic stroma."""
    shape, mpp = sheet.shape, sheet.mpp
    warp = tuple(9.0 * smooth_noise(rng, shape, 40.0 / mpp) for _ in range(2))
    hubs = scatter(rng, np.ones_like(weight), mpp, float(rng.uniform(75.0, 100.0)), rounds=6)
    if len(hubs) < 3:
        hubs = rng.uniform(0, min(shape) * mpp, (3, 2))
    islands = cell_field(hubs, shape, mpp, (warp[0], warp[1]))
    band = 11.0 + 6.0 * smooth_noise(rng, shape, 70.0 / mpp)
    nest = weight * smoothstep(islands.second - islands.first - band, -0.8, 0.8)
    cells = scatter(rng, nest, mpp, float(rng.uniform(9.0, 10.2)), rounds=9)
    if len(cells) < 3:
        return
    wiggle = tuple(1.2 * smooth_noise(rng, shape, 7.0 / mpp) for _ in range(2))
    field = cell_field(cells, shape, mpp, (wiggle[0], wiggle[1]))
    tone = rng.uniform(0.75, 1.25, len(cells)).astype(np.float32)[field.owner]
    grain = 1.0 + 0.18 * smooth_noise(rng, shape, 1.7 / mpp) + 0.1 * smooth_noise(rng, shape, 6.0 / mpp)
    border = np.exp(-(((field.second - field.first) / 1.1) ** 2)).astype(np.float32)
    cracks = smoothstep(smooth_noise(rng, shape, 26.0 / mpp), 0.9, 1.8) * border
    eosin = (0.23 * tone * grain + 0.05 * border) * (1 - 0.75 * cracks)
    haematoxylin = 0.15 * tone * grain * (1 - 0.75 * cracks)
    sheet.lay(nest, haematoxylin=haematoxylin, eosin=eosin)
    fate = rng.random(len(cells))
    clear = np.exp(-((field.first / 4.6) ** 6)).astype(np.float32) * nest
    sheet.lay(0.6 * clear * (fate[field.owner] < 0.022), haematoxylin=0.05, eosin=0.1)
    red = clear * ((fate[field.owner] >= 0.022) & (fate[field.owner] < 0.04))
    sheet.lay(red, haematoxylin=0.06, eosin=0.5)
    stamp(sheet, rng, MITOSIS, cells[fate < 0.022])
    stamp(sheet, rng, PYKNOTIC, cells[(fate >= 0.022) & (fate < 0.04)])
    stamp(sheet, rng, TUMOUR, cells[fate >= 0.04])
    between = scatter(rng, weight * (nest < 0.05), mpp, 9.0, rounds=3)
    kind = rng.random(len(between))
    stamp(sheet, rng, FIBROBLAST, between[kind < 0.6], along_fibres(sheet, rng, between[kind < 0.6], 0.4))
    stamp(sheet, rng, LYMPHOCYTE, between[kind >= 0.75])
