"""Sheets of lymphocytes, and necrosis."""

import numpy as np

from pathokd.phantom.noise import F32, smooth_noise, smoothstep
from pathokd.phantom.nuclei import CENTROCYTE, DUST, ENDOTHELIUM, GHOST, LYMPHOCYTE, PYKNOTIC, discs, stamp
from pathokd.phantom.sheet import Sheet, cell_field, scatter


def paint_lymphocytes(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """Small round dark nuclei side by side, paler follicle centres of larger cells, and thin clear seams."""
    shape, mpp = sheet.shape, sheet.mpp
    follicle = smoothstep(smooth_noise(rng, shape, 150.0 / mpp), 0.85, 1.05)
    sparse = smoothstep(smooth_noise(rng, shape, 60.0 / mpp), 0.9, 1.6)
    small = scatter(rng, weight * (follicle < 0.5) * (sparse < 0.5), mpp, 5.25, rounds=12)
    loose = scatter(rng, weight * (follicle < 0.5) * (sparse >= 0.5), mpp, 7.2, rounds=8)
    large = scatter(rng, weight * (follicle >= 0.5), mpp, 8.3, rounds=10)
    cells = np.concatenate([small, loose, large])
    if len(cells) < 3:
        return
    wiggle = tuple(0.8 * smooth_noise(rng, shape, 6.0 / mpp) for _ in range(2))
    field = cell_field(cells, shape, mpp, (wiggle[0], wiggle[1]))
    seam = np.exp(-(((field.second - field.first) / 0.9) ** 2)).astype(np.float32)
    grain = 1.0 + 0.2 * smooth_noise(rng, shape, 1.8 / mpp) + 0.15 * smooth_noise(rng, shape, 9.0 / mpp)
    pale = smoothstep(smooth_noise(rng, shape, 14.0 / mpp), -0.2, 1.4)
    body = (1 - 0.75 * seam * pale) * grain
    sheet.lay(weight, haematoxylin=0.14 * body, eosin=(0.16 + 0.05 * follicle) * body)
    stamp(sheet, rng, LYMPHOCYTE, small)
    stamp(sheet, rng, LYMPHOCYTE, loose)
    kind = rng.random(len(large))
    stamp(sheet, rng, CENTROCYTE, large[kind < 0.88])
    stamp(sheet, rng, DUST, large[kind >= 0.94])
    stamp(sheet, rng, ENDOTHELIUM, scatter(rng, weight, mpp, 38.0, rounds=2))


def paint_necrosis(sheet: Sheet, weight: F32, rng: np.random.Generator) -> None:
    """Smudged granular eosin, outlines of dead cells, nuclear dust in clouds, a few red cells and cracks."""
    shape, mpp = sheet.shape, sheet.mpp
    fine = smooth_noise(rng, shape, 1.6 / mpp)
    middle = smooth_noise(rng, shape, 5.0 / mpp)
    wide = smooth_noise(rng, shape, 70.0 / mpp)
    cells = scatter(rng, np.ones_like(weight), mpp, 10.0, rounds=6)
    wiggle = tuple(1.5 * smooth_noise(rng, shape, 8.0 / mpp) for _ in range(2))
    field = cell_field(cells, shape, mpp, (wiggle[0], wiggle[1]))
    ghostly = smoothstep(smooth_noise(rng, shape, 80.0 / mpp), -0.3, 0.6)
    edge = np.exp(-(((field.second - field.first) / 1.4) ** 2)).astype(np.float32)
    tone = rng.uniform(-1, 1, len(cells)).astype(np.float32)[field.owner]
    eosin = 0.34 + 0.045 * fine + 0.04 * middle + 0.03 * wide + ghostly * (0.035 * tone - 0.13 * edge)
    holes = (
        smooth_noise(rng, shape, 9.0 / mpp) + 0.5 * middle + 0.25 * fine + 0.6 * smooth_noise(rng, shape, 60.0 / mpp)
    )
    cracks = smoothstep(holes, 2.0, 2.9)
    haematoxylin = np.maximum(0.05 + 0.012 * fine + 0.012 * middle - 0.012 * wide, 0.005)
    clear = 1 - 0.8 * cracks
    sheet.lay(weight, haematoxylin=haematoxylin * clear, eosin=np.maximum(eosin, 0.06) * clear)
    inside = weight[np.clip((cells[:, 1] / mpp).astype(np.intp), 0, shape[0] - 1),
                    np.clip((cells[:, 0] / mpp).astype(np.intp), 0, shape[1] - 1)] > 0.5  # fmt: skip
    shown = cells[inside & (rng.random(len(cells)) < 0.55)]
    stamp(sheet, rng, GHOST, shown)
    cloud = smoothstep(smooth_noise(rng, shape, 55.0 / mpp), 0.1, 1.3)
    for spacing, low in ((7.5, 0.25), (4.0, 0.75)):
        dust = scatter(rng, weight * (cloud > low), mpp, spacing, rounds=2)
        stamp(sheet, rng, DUST, dust, gain=0.9)
    stamp(sheet, rng, PYKNOTIC, scatter(rng, weight * (cloud > 0.2), mpp, 19.0, rounds=2), gain=0.8)
    stamp(sheet, rng, DUST, scatter(rng, weight, mpp, 17.0, rounds=2))
    bleed = smoothstep(smooth_noise(rng, shape, 90.0 / mpp), 1.5, 1.9)
    discs(sheet, rng, scatter(rng, weight * bleed, mpp, 5.6, rounds=6), 3.1, 0.36)
