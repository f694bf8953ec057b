"""Where the tissue is on an overview of an H&E (or IHC) slide, and how much of each tile it covers."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pathokd.slides.integral import box_sums, integral
from pathokd.types import FloatArray, IntArray, Mask, Microns, Mpp, Rgb

STAIN_RANGE = (0.02, 0.035)
"""Bounds of the Otsu threshold on stain (see `stain_density`). Clean glass stays below 0.015, the palest IHC
tissue seen is about 0.025. They make a slide of glass come out empty and a field full of tissue come out
full."""
GREY_WEIGHT = 0.3
"""How much plain darkness counts beside colour: enough for pale grey IHC tissue, too little for shadows on
glass."""
GREY_LIMIT = 4.0
"""Darkness counts up to so many times the spread over the channels: the grey edge of a coverslip has next to
none."""
SMOOTH_UM: Microns = 8.0
"""Sigma of the blur before thresholding; joins nuclei with the pale stroma between them."""
CLOSE_UM: Microns = 24.0
"""Gaps up to twice this are bridged."""
OPEN_UM: Microns = 12.0
"""Strands thinner than twice this go: dust, coverslip edges, scratches."""
MIN_OBJECT_UM2 = 4e3
MIN_HOLE_UM2 = 2e4
PEN_MIN_UM2 = 1e4
"""Ink-coloured spots smaller than this are tissue pigment, blood or dirt rather than a pen stroke."""
PEN_HALO_UM: Microns = 120.0
"""How far the washed-out rim of a stroke reaches."""

NOT_BRIGHTFIELD = (
    "{path} does not look like brightfield (its overview is dark): pathokd is made for H&E and IHC; "
    "leave fluorescence slides out."
)


def tissue_mask(thumb: Rgb, mpp: Mpp = 8.0) -> Mask:
    """Find tissue by its stain: Otsu on `stain_density`, guarded, then morphology in microns.

    Grey things (shadows, air bubbles) absorb all channels alike and hardly count; coverslip edges and dust
    are too thin for the morphology; pen ink is known by its colours (see `pen_mask`). Deterministic.

    Args:
        thumb: overview, shape (height, width, 3); about 8 um/px is right.
        mpp: microns per pixel of `thumb`.

    Returns:
        shape (height, width), True on tissue.
    """
    od = optical_density(_blur(thumb, SMOOTH_UM / mpp))
    stain = stain_density(od)
    junk = pen_mask(od, mpp) | _black(thumb)
    mask = (stain > otsu_threshold(stain[~junk])) & ~junk
    mask = _erode(_dilate(mask, CLOSE_UM / mpp), CLOSE_UM / mpp)
    mask = _dilate(_erode(mask, OPEN_UM / mpp), OPEN_UM / mpp)
    return fill_holes(drop_small(mask, MIN_OBJECT_UM2 / mpp**2), MIN_HOLE_UM2 / mpp**2)


def tissue_fraction(
    mask: Mask, x: IntArray, y: IntArray, *, mask_downsample: float, tile_level0: float
) -> npt.NDArray[np.float32]:
    """Share of each tile covered by tissue, exact for the mask, also where tile borders cut its pixels.

    Args:
        mask: shape (height, width), True on tissue; its top-left corner is the slide's.
        x: left edges in level-0 pixels, shape (n,).
        y: top edges in level-0 pixels, shape (n,).
        mask_downsample: level-0 pixels per mask pixel.
        tile_level0: side of a tile in level-0 pixels.

    Returns:
        shape (n,), 0 to 1; what lies outside the mask counts as no tissue.
    """
    side = tile_level0 / mask_downsample
    left, top = np.asarray(x) / mask_downsample, np.asarray(y) / mask_downsample
    covered = box_sums(integral(mask), left, top, side, side) / side**2
    return np.clip(covered, 0, 1).astype(np.float32)


def is_brightfield(thumb: Rgb) -> bool:
    """False for a dark field such as fluorescence: brightfield has glass or at least lit tissue.

    Args:
        thumb: overview, shape (height, width, 3).
    """
    brightest = thumb.max(axis=2)
    return bool(brightest.mean() > 60 or (brightest > 170).mean() > 0.1)


def optical_density(rgb: Rgb) -> npt.NDArray[np.float32]:
    """Optical density, -log10(I / I0), against the slide's own glass where it shows, else against white.

    Args:
        rgb: shape (height, width, 3).

    Returns:
        same shape, 0 for glass.
    """
    table = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
    glass = table[_glass(rgb)]
    density: npt.NDArray[np.float32] = np.maximum(table[rgb] - glass, 0).astype(np.float32)
    return density


def stain_density(od: FloatArray) -> npt.NDArray[np.float32]:
    """Amount of stain: the spread of optical density over the channels, plus a little of its mean where there
    is colour.

    Args:
        od: optical density, shape (height, width, 3).

    Returns:
        shape (height, width).
    """
    spread = od.max(axis=2) - od.min(axis=2)
    darkness = np.minimum(od.mean(axis=2), GREY_LIMIT * spread)
    density: npt.NDArray[np.float32] = (spread + GREY_WEIGHT * darkness).astype(np.float32)
    return density


def otsu_threshold(stain: FloatArray) -> float:
    """Otsu's threshold on stain, kept within `STAIN_RANGE`.

    Args:
        stain: any shape.

    Reference:
        Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979), eq. 18.
    """
    if stain.size == 0:
        return STAIN_RANGE[1]
    # The lower end decides; capping the upper keeps a few dark folds from pulling the threshold up.
    top = 4 * STAIN_RANGE[1]
    levels = np.clip(stain.reshape(1, -1) / top * 255, 0, 255).astype(np.uint8)
    level, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(np.clip(level / 255 * top, *STAIN_RANGE))


def pen_mask(od: FloatArray, mpp: Mpp = 8.0) -> Mask:
    """Find felt-pen ink by colours that stains do not have.

    Haematoxylin, eosin and DAB absorb green about as much as red or more. Ink that absorbs green least is
    green; ink that absorbs red far more than green is blue (pale blue nuclei of an IHC slide come close, so
    the bar is high). Red ink absorbs blue like green and leaves red alone; eosin absorbs less blue, and blood
    more red. Black ink absorbs all channels strongly. Only strokes of some area count, and their pale rim is
    taken along.

    Args:
        od: optical density, shape (height, width, 3).
        mpp: microns per pixel.
    """
    red, green, blue = od[..., 0], od[..., 1], od[..., 2]
    cold = ((red - green > 0.08) & (green < blue)) | (red - green > 0.2)
    warm = ((green > 0.12) & (blue > 0.72 * green) & (red < 0.13 * green)) | (
        (green > 0.8) & (blue > 0.85 * green) & (red < 0.25 * green)
    )
    black = od.min(axis=2) > 0.65
    strong = drop_small(cold | warm | black, PEN_MIN_UM2 / mpp**2)
    if not strong.any():
        return strong
    pale = ((red > green) & (red > 0.03)) | ((blue > 0.7 * green) & (red < 0.2 * green) & (green > 0.04))
    return strong | (_dilate(strong, PEN_HALO_UM / mpp) & pale)


def drop_small(mask: Mask, min_px: float) -> Mask:
    """Remove 8-connected objects of fewer than `min_px` pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_px
    keep[0] = False
    kept: Mask = keep[labels] if count > 1 else np.zeros_like(mask)
    return kept


def fill_holes(mask: Mask, max_px: float) -> Mask:
    """Fill holes of fewer than `max_px` pixels that are enclosed on all sides (the image border is no
    side)."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    fill = stats[:, cv2.CC_STAT_AREA] < max_px
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    fill[border] = False
    fill[0] = False
    filled: Mask = mask | fill[labels] if count > 1 else mask
    return filled


def _glass(rgb: Rgb) -> npt.NDArray[np.uint8]:
    """Colour of empty glass: the median of the brightest pixels if they are bright and nearly grey, else
    white."""
    darkest = rgb.min(axis=2)
    bright = rgb[darkest >= np.percentile(darkest, 90)]
    colour = np.median(bright, axis=0).astype(np.uint8)
    is_glass = colour.min() > 190 and int(colour.max()) - int(colour.min()) < 25
    return colour if is_glass else np.full(3, 255, np.uint8)


def _black(thumb: Rgb) -> Mask:
    """Unscanned areas that a scanner left black."""
    black: Mask = thumb.max(axis=2) < 25
    return black


def _blur(rgb: Rgb, sigma_px: float) -> Any:
    return rgb if sigma_px < 0.3 else cv2.GaussianBlur(rgb, (0, 0), sigma_px)


def _dilate(mask: Mask, radius_px: float) -> Mask:
    """Grow by a disc of any radius; by distance, since a structuring element is slow when it is large."""
    if not mask.any():
        return mask
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    grown: Mask = np.asarray(distance) <= radius_px
    return grown


def _erode(mask: Mask, radius_px: float) -> Mask:
    """Shrink by a disc; the image border does not count as an edge."""
    return ~_dilate(~mask, radius_px)
