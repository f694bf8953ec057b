"""From tiles of two scanners to the profile between them: colour in optical density, sharpness, noise.

Registered tiles (the same tissue under both) give the colour map by regression. Unregistered ones give it by the linear
transport between their distributions about the glass, where no dye is: under Beer-Lambert a scanner that sees every dye
another way is a linear map there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from pathokd.augment.optics_math import gaussian_blur, sensor_noise, unsharp_mask
from pathokd.augment.scanner import ScannerProfile
from pathokd.augment.stain_math import affine_od, to_od
from pathokd.types import Rgb

Floats = npt.NDArray[np.float64]

REGISTRATION_PX = 2.0
"""Blur before registered pixels are compared: forgives a shift of as much."""
TYPICAL_GLASS = np.full(3, 0.06)
"""Density of glass where the tiles show none."""
DARKEST_GLASS = 0.2
"""Mean density up to which the brightest pixels may be glass."""
TISSUE_ABOVE_GLASS = 0.09
"""Mean density above glass from which a pixel is tissue."""
BAND = (0.04, 0.5)
"""Cycles per pixel that sharpness and noise are judged by; below lies content."""
MAX_SHARPEN = 3.0
MAX_READ = 8.0


class ColourMap(NamedTuple):
    """`od @ matrix.T + offset`."""

    matrix: Floats
    offset: Floats


def fit_scanner_profile(
    source_tiles: Sequence[Rgb],
    target_tiles: Sequence[Rgb],
    *,
    registered: bool = False,
    name: str = "fitted",
    source: str = "",
) -> ScannerProfile:
    """Estimate the profile that makes tiles of one scanner look like those of another.

    Args:
        source_tiles: uint8 images of the scanner to change.
        target_tiles: images of the scanner to reach, at the same microns per pixel.
        registered: image i of both shows the same tissue, to a few pixels.
        name: of the profile.
        source: what was measured, for the record.

    Returns:
        The profile. Tiles without enough colour to tell by leave the colours as they are.

    Raises:
        ValueError: no tiles, wrong shapes, or registered tiles that do not pair.

    Reference:
        Pitie and Kokaram 2007, "The linear Monge-Kantorovitch linear colour mapping for example-based colour transfer",
        equation 9, here on second moments about the glass.
    """
    a, b = checked_tiles("source_tiles", source_tiles), checked_tiles("target_tiles", target_tiles)
    if registered and [x.shape for x in a] != [x.shape for x in b]:
        raise ValueError(
            f"registered tiles must pair one by one in shape, got {len(a)} and {len(b)}: cut both at the same microns "
            "per pixel, or pass registered=False."
        )
    colour = registered_colour(a, b) if registered else transported_colour(a, b)
    mapped = [affine_od(tile, *colour, keep_glass=False) for tile in a]
    blur, sharpen, read = fit_detail(mapped, b, registered=registered)
    return ScannerProfile(
        name, source, _rows(colour.matrix), _row(colour.offset), blur_px=blur, sharpen=sharpen, read=read
    )


def _row(values: Floats) -> tuple[float, float, float]:
    r, g, b = (round(float(value), 4) for value in values)
    return r, g, b


def _rows(matrix: Floats) -> tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]:
    return _row(matrix[0]), _row(matrix[1]), _row(matrix[2])


def checked_tiles(name: str, tiles: Sequence[Rgb]) -> list[Rgb]:
    """The tiles as a list.

    Raises:
        ValueError: none, or one that is no 8-bit RGB image of at least 16 px.
    """
    found = list(tiles)
    if not found:
        raise ValueError(f"{name} holds no tile: give at least one, better twenty.")
    for tile in found:
        if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape[2] != 3 or min(tile.shape[:2]) < 16:
            raise ValueError(f"{name} must be uint8 RGB of at least 16 px a side, got {tile.dtype} {tile.shape}.")
    return found


def registered_colour(source: Sequence[Rgb], target: Sequence[Rgb]) -> ColourMap:
    """Affine least squares between blurred densities, with Huber's weights so that misplaced edges do not pull.

    Shrunk towards the unit matrix by a ridge that matters only where tiles hold next to one colour.
    """
    x, y = (np.concatenate([_soft_od(tile) for tile in tiles]) for tiles in (source, target))
    design = np.column_stack([x, np.ones(len(x))])
    prior = np.vstack([np.eye(3), np.zeros(3)])
    ridge = np.diag([3e-4, 3e-4, 3e-4, 1e-6]) * len(x)
    weight = np.ones(len(x))
    solved = prior
    for _ in range(8):
        weighted = design * weight[:, None]
        solved = np.linalg.solve(weighted.T @ design + ridge, weighted.T @ y + ridge @ prior)
        residual = np.linalg.norm(y - design @ solved, axis=1)
        scale = 1.345 * max(float(np.median(residual)) / 0.8, 1e-3)
        weight = np.minimum(1.0, scale / np.maximum(residual, 1e-9))
    return ColourMap(solved[:3].T, solved[3])


def _soft_od(tile: Rgb) -> Floats:
    """Density of a blurred tile, every fourth pixel."""
    blurred = np.asarray(cv2.GaussianBlur(tile, (0, 0), REGISTRATION_PX), np.uint8)
    return to_od(np.ascontiguousarray(blurred[::4, ::4])).reshape(-1, 3).astype(np.float64)


def transported_colour(source: Sequence[Rgb], target: Sequence[Rgb]) -> ColourMap:
    """The symmetric map about the glass that gives densities of the source the second moments of the target's."""
    sides = [
        np.concatenate([to_od(tile).reshape(-1, 3)[::3] for tile in tiles]).astype(np.float64)
        for tiles in (source, target)
    ]
    glass = [_glass(od) for od in sides]
    moments = []
    for od, zero in zip(sides, glass, strict=True):
        tissue = od[od.mean(axis=1) > zero.mean() + TISSUE_ABOVE_GLASS]
        if len(tissue) < 0.02 * len(od) or len(tissue) < 50:
            return ColourMap(np.eye(3), np.zeros(3))  # too little to tell by
        centred = tissue - zero
        # A ridge keeps a tile of one colour from asking for colours it does not show.
        moments.append(centred.T @ centred / len(centred) + 1e-3 * np.eye(3))
    matrix = transport(*moments)
    return ColourMap(matrix, glass[1] - matrix @ glass[0])


def transport(source: Floats, target: Floats) -> Floats:
    """The symmetric positive matrix A with `A @ source @ A = target`, both (3, 3) and positive definite."""
    root, inverse = _power(source, 0.5), _power(source, -0.5)
    return inverse @ _power(root @ target @ root, 0.5) @ inverse


def _power(matrix: Floats, exponent: float) -> Floats:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T)


def _glass(od: Floats) -> Floats:
    """Median density of the brightest, nearly grey pixels; the typical one where hardly any are.

    Bright is relative to the tiles' own brightest, as scanners show clean glass anywhere from 0.02 to 0.16.
    """
    mean = od.mean(axis=1)
    brightest = float(np.quantile(mean, 0.02))
    if brightest > DARKEST_GLASS:
        return TYPICAL_GLASS
    glass = od[(mean < brightest + 0.06) & (np.ptp(od, axis=1) < 0.12)]
    return np.asarray(np.median(glass, axis=0) if len(glass) > 0.005 * len(od) else TYPICAL_GLASS)


def radial_spectrum(tiles: Sequence[Rgb]) -> tuple[Floats, Floats]:
    """Mean power spectrum of the mean density, averaged over directions.

    Returns:
        Frequencies in cycles per pixel, and power, (n,) each.
    """
    edges = np.linspace(0.01, 0.5, 40)
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for tile in tiles:
        grey = to_od(tile).mean(axis=2).astype(np.float64)
        window = np.outer(np.hanning(grey.shape[0]), np.hanning(grey.shape[1]))
        power = np.abs(np.fft.rfft2((grey - grey.mean()) * window)) ** 2 / (window**2).sum()
        across, down = np.fft.rfftfreq(grey.shape[1]), np.fft.fftfreq(grey.shape[0])
        ring = np.digitize(np.hypot(down[:, None], across[None]), edges) - 1
        inside = (ring >= 0) & (ring < len(sums))
        sums += np.bincount(ring[inside], power[inside], len(sums))
        counts += np.bincount(ring[inside], minlength=len(counts))
    # A tile of few pixels has no frequency in some rings: as if empty, they would tell its size, not its sharpness.
    f, seen = (edges[1:] + edges[:-1]) / 2, counts > 0
    return f, np.interp(f, f[seen], sums[seen] / counts[seen]) + 1e-12


def fit_detail(source: Sequence[Rgb], target: Sequence[Rgb], *, registered: bool = False) -> tuple[float, float, float]:
    """Blur or sharpening, and noise, that bring the source's spectrum nearest to the target's.

    Args:
        source: tiles, their colours mapped.
        target: tiles.
        registered: both show the same tissue. Otherwise the sets must differ by more than their own tiles do among each
            other: fat and lymphocytes have other spectra on one and the same scanner.

    Returns:
        Standard deviation of a blur in pixels, amount of an unsharp mask of 1 px (one of the two is 0), and read noise.
    """
    source, target = _some(source), _some(target)
    if not (registered or _differ(source, target)):
        return 0.0, 0.0, 0.0
    f, wanted = radial_spectrum(target)
    band = f > BAND[0]

    def distance(values: Floats) -> float:
        sharp, read = float(np.clip(values[0], -4, MAX_SHARPEN)), float(np.clip(values[1], 0, MAX_READ))
        rng = np.random.default_rng(0)
        changed = [sensor_noise(_sharper(tile, sharp), 0.0, read, rng) for tile in source]
        rest = np.log(radial_spectrum(changed)[1][band] / wanted[band])
        return float(rest.std())

    starts = [np.array(start) for start in ((0.0, 0.0), (-1.0, 0.5), (1.0, 0.5))]
    start = min(starts, key=distance)
    best = minimize(distance, start, method="Nelder-Mead", options={"initial_simplex": _simplex(start), "maxfev": 60})
    if best.fun > 0.9 * distance(starts[0]):
        return 0.0, 0.0, 0.0
    sharp, read = float(np.clip(best.x[0], -4, MAX_SHARPEN)), float(np.clip(best.x[1], 0, MAX_READ))
    return round(max(-sharp, 0.0), 3), round(max(sharp, 0.0), 3), round(read, 3)


def _simplex(start: Floats) -> Floats:
    return np.asarray(start + np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.7]]))


def _sharper(tile: Rgb, sharp: float) -> Rgb:
    """Sharpened by `sharp`, or blurred by `-sharp` pixels."""
    return unsharp_mask(tile, sharp) if sharp > 0 else gaussian_blur(tile, -sharp)


def _some(tiles: Sequence[Rgb], count: int = 12, side: int = 256) -> list[Rgb]:
    """Up to `count` tiles, evenly drawn, and of each at most its middle."""
    picked = [tiles[i] for i in np.unique(np.linspace(0, len(tiles) - 1, min(count, len(tiles))).astype(int))]
    corners = [((max(0, (t.shape[0] - side) // 2)), max(0, (t.shape[1] - side) // 2)) for t in picked]
    return [np.ascontiguousarray(t[y : y + side, x : x + side]) for t, (y, x) in zip(picked, corners, strict=True)]


def _differ(source: Sequence[Rgb], target: Sequence[Rgb]) -> bool:
    """Whether the fall of the spectra differs between the sets by more than two standard errors over their tiles."""
    falls = []
    for tiles in (source, target):
        spectra = [radial_spectrum([tile]) for tile in tiles]
        falls.append(np.array([np.polyfit(f[f > BAND[0]], np.log(power[f > BAND[0]]), 1)[0] for f, power in spectra]))
    if min(map(len, falls)) < 3:
        return False
    error = math.sqrt(sum(float(fall.var(ddof=1)) / len(fall) for fall in falls))
    return bool(abs(falls[0].mean() - falls[1].mean()) > 2 * error)


def colour_distance(a: Sequence[Rgb], b: Sequence[Rgb], *, registered: bool = False) -> float:
    """How far apart two sets of tiles are in colour, in units of CIELAB.

    Args:
        a: tiles.
        b: tiles; of the same tissue one by one if `registered`.
        registered: mean colour difference (CIE76) of lightly blurred pixels; otherwise the sliced Wasserstein distance
            between the distributions, which needs no pairs but sees other tissue as a difference.
    """
    if registered:
        return float(np.mean([np.linalg.norm(_lab(x) - _lab(y), axis=1).mean() for x, y in zip(a, b, strict=True)]))
    first, second = (np.concatenate([_lab(tile) for tile in tiles]) for tiles in (a, b))
    levels = (np.arange(400) + 0.5) / 400
    quantiles = [np.quantile(colours @ _directions().T, levels, axis=0) for colours in (first, second)]
    return float(np.abs(quantiles[0] - quantiles[1]).mean())


def _lab(tile: Rgb) -> Floats:
    """CIELAB of a blurred tile, every fourth pixel, (n, 3)."""
    soft = cv2.GaussianBlur(tile, (0, 0), REGISTRATION_PX)[::4, ::4]
    lab = cv2.cvtColor(np.ascontiguousarray(soft, dtype=np.float32) / 255, cv2.COLOR_RGB2LAB)
    return np.asarray(lab, np.float64).reshape(-1, 3)


def _directions(count: int = 32) -> Floats:
    """Directions spread evenly over half a sphere, (count, 3)."""
    number = np.arange(count) + 0.5
    height, turn = number / count, number * math.pi * (3 - math.sqrt(5))
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)


def spectrum_distance(a: Sequence[Rgb], b: Sequence[Rgb]) -> float:
    """Difference in shape of two sets' radial power spectra: standard deviation of the log10 of their ratio.

    A common factor does not count, as contrast is a matter of colour.
    """
    f, first = radial_spectrum(a)
    _, second = radial_spectrum(b)
    band = f > BAND[0]
    return float(np.log10(first[band] / second[band]).std())
