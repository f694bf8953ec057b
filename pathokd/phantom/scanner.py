"""Scanners: optics, sensor and colour processing between the stained section and an 8-bit image."""

import hashlib
import math
from dataclasses import dataclass

import cv2
import numpy as np
import scipy.sparse
from scipy.special import erf

from pathokd.phantom.noise import F32
from pathokd.phantom.scene import Scene
from pathokd.phantom.stain import Staining, get_staining, transmit
from pathokd.types import Microns, Mpp, Rgb


@dataclass(frozen=True)
class Scanner:
    """One scanner model: everything that makes the same section look different.

    Attributes:
        name: used in file names.
        mpp: native microns per pixel.
        psf_um: standard deviation of the optical blur, microns.
        shift_um: lateral shift of red and blue against green (chromatic aberration), microns, in x.
        white: 8-bit value of clear glass in red, green and blue.
        flare: stray light as a part of full scale; lifts the blacks.
        saturation: 1 keeps colours, under 1 greys, over 1 strengthens them (greys stay).
        warmth: moves the red gain up and blue down for everything that is not white.
        gamma: exponent of the tone curve; at 2.2 densities come out as stated.
        contrast: S-curve around middle grey, 0 is none.
        sharpen: amount of the unsharp mask (radius one pixel).
        shot: standard deviation of noise at full scale in 8-bit steps, falling with the root of the light.
        read: standard deviation of noise in the dark in 8-bit steps.
        jpeg_quality: of the slide file.
    """

    name: str
    mpp: Mpp = 0.5
    psf_um: Microns = 0.3
    shift_um: Microns = 0.0
    white: tuple[int, int, int] = (244, 244, 245)
    flare: float = 0.004
    saturation: float = 1.0
    warmth: float = 0.0
    gamma: float = 2.2
    contrast: float = 0.0
    sharpen: float = 0.25
    shot: float = 0.6
    read: float = 0.4
    jpeg_quality: int = 80

    def __post_init__(self) -> None:
        if not 0.1 <= self.mpp <= 20 or self.psf_um < 0:
            raise ValueError(f"mpp must lie in 0.1 to 20 and psf_um be 0 or more, got {self.mpp} and {self.psf_um}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must lie in 1 to 100, got {self.jpeg_quality}: slides use 70 to 90.")


SCANNERS: dict[str, Scanner] = {
    s.name: s
    for s in (
        Scanner("S50"),
        Scanner("S45", 0.4545, 0.38, 0.09, (236, 232, 222), 0.012, 0.86, 0.07, 2.0, 0.12, 0.1, 0.6, 0.4),
        Scanner("S55", 0.5489, 0.28, -0.07, (238, 243, 251), 0.008, 1.12, -0.07, 2.3, 0.3, 0.7, 1.0, 0.7),
        Scanner("S25", 0.25, 0.19, 0.03, (240, 239, 242), 0.006, 1.08, 0.02, 2.1, 0.15, 0.4, 1.4, 0.9),
    )
}
"""Named scanners; the number is the native resolution in hundredths of um/px.

They are invented, within the range of models on the market: softer and warmer, sharper and bluer, or at 40x.
"""


def get_scanner(name: str | Scanner) -> Scanner:
    """A scanner by name (or itself)."""
    if isinstance(name, Scanner):
        return name
    if name not in SCANNERS:
        raise ValueError(f"scanner must be one of {', '.join(SCANNERS)}, got {name!r}: choose one of these.")
    return SCANNERS[name]


def render(
    scene: Scene,
    stain: str | Staining,
    scanner: str | Scanner,
    mpp: Mpp | None = None,
    *,
    noise_seed: int = 0,
) -> Rgb:
    """What a scanner sees of a scene in a staining.

    Args:
        scene: the tissue.
        stain: a staining or its name in `STAININGS`.
        scanner: a scanner or its name in `SCANNERS`.
        mpp: microns per pixel of the result; None is the scanner's own.
        noise_seed: another value, another exposure: same tissue, other noise.

    Returns:
        RGB image, `floor(scene.size_um / mpp)` pixels a side; pixel (0, 0) begins at the scene's corner.
    """
    staining, camera = get_staining(stain), get_scanner(scanner)
    pixel = camera.mpp if mpp is None else mpp
    side = math.floor(scene.size_um / pixel + 1e-6)
    down = sampling(len(scene.eosin), scene.mpp, side, pixel, camera.psf_um)
    planes = []
    for light, shift in zip(transmit(scene, staining), (camera.shift_um, 0.0, -camera.shift_um), strict=True):
        over = sampling(len(scene.eosin), scene.mpp, side, pixel, camera.psf_um, shift)
        planes.append(np.asarray((over @ np.ascontiguousarray((down @ light).T)).T, dtype=np.float32))
    key = hashlib.sha256(f"{scene.seed}/{staining.name}/{camera.name}/{pixel}/{noise_seed}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(key, dtype=np.uint32))
    return develop(np.stack(planes, axis=-1), camera, rng)


def sampling(
    n_in: int, mpp_in: Mpp, n_out: int, mpp_out: Mpp, psf_um: Microns, shift_um: Microns = 0.0
) -> scipy.sparse.csr_array:
    """Matrix that images one axis: blur by the optics and integrate over each sensor pixel, in one step.

    The weight of a source pixel is the integral of a Gaussian of deviation `psf_um` over the sensor pixel,
    taken at the source pixel's centre; rows sum to 1. Positions are exact at any ratio of the two grids,
    which keeps renderings of different scanners registered, and integrating over the pixel prevents aliasing.

    Returns:
        Sparse matrix (n_out, n_in).
    """
    blur = math.hypot(psf_um, 0.45 * mpp_in) * math.sqrt(2.0)
    centre = (np.arange(n_out) + 0.5) * mpp_out + shift_um
    reach = mpp_out / 2 + 2.2 * blur
    taps = 2 * math.ceil(reach / mpp_in) + 1
    first = np.floor(centre / mpp_in).astype(np.intp) - taps // 2
    index = first[:, None] + np.arange(taps)
    away = (index + 0.5) * mpp_in - centre[:, None]
    weight = erf((away + mpp_out / 2) / blur) - erf((away - mpp_out / 2) / blur)
    weight /= weight.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(n_out), taps)
    columns = np.clip(index, 0, n_in - 1).ravel()
    entries = (weight.ravel().astype(np.float32), (rows, columns))
    return scipy.sparse.coo_array(entries, shape=(n_out, n_in)).tocsr()


def develop(light: F32, scanner: Scanner, rng: np.random.Generator) -> Rgb:
    """From light on the sensor to 8 bits: flare, colour matrix, tone curve, noise, white point, sharpening.

    Args:
        light: (rows, columns, 3) linear light, 1 is clear glass.
        scanner: its colour processing and noise.
        rng: source of the noise.
    """
    light = (light + np.float32(scanner.flare)) / np.float32(1 + scanner.flare)
    tone = np.clip(light @ _colour_matrix(scanner).T, 1e-5, 1.0)
    tone = tone ** np.float32(1.0 / scanner.gamma)
    tone = tone + np.float32(scanner.contrast) * tone * (1 - tone) * (2 * tone - 1)
    steps = tone * np.array(scanner.white, dtype=np.float32)
    noise = rng.standard_normal(steps.shape, dtype=np.float32)
    steps = steps + noise * np.sqrt(scanner.shot**2 * tone + scanner.read**2)
    if scanner.sharpen:
        steps = steps + np.float32(scanner.sharpen) * (steps - cv2.GaussianBlur(steps, (0, 0), 1.0))
    return np.asarray(np.clip(np.rint(steps), 0, 255), dtype=np.uint8)


def _colour_matrix(scanner: Scanner) -> F32:
    """Saturation spreads colours, warmth turns them to red or blue; rows sum to 1, so greys stay."""
    luma = np.array([[0.2126, 0.7152, 0.0722]])
    spread = scanner.saturation * np.eye(3) + (1 - scanner.saturation) * np.repeat(luma, 3, axis=0)
    turn = scanner.warmth * np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, -1.0]])
    return np.asarray(spread + turn, dtype=np.float32)
