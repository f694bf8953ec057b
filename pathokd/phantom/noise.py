"""Smooth random fields and the curved coordinates that turn them into fibres."""

import math
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

F32: TypeAlias = npt.NDArray[np.float32]
"""A single-precision image or table."""
TILE_PX = 512
"""Side of the periodic noise tiles that `fibre_noise` and nuclei sample from."""


class Curl(NamedTuple):
    """Curved coordinates: `along` runs with the fibres, `across` over them (microns), `angle` in radians."""

    along: F32
    across: F32
    angle: F32


def smoothstep(x: F32, low: float, high: float) -> F32:
    """Rise from 0 at `low` to 1 at `high` with flat ends (falls if `low > high`)."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), dtype=np.float32)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale_px: float) -> F32:
    """Isotropic noise with mean about 0, deviation 1 and features about `scale_px` pixels wide.

    White noise on a grid four times finer than the features is blurred there and enlarged, so that wide
    features cost no more than narrow ones.

    Args:
        rng: source of the noise.
        shape: (rows, columns) of the result.
        scale_px: feature width in pixels, at least 1.

    Returns:
        Array of `shape`.
    """
    step = max(1, int(scale_px / 4))
    coarse = tuple(math.ceil(n / step) + 4 for n in shape)
    sigma = max(0.3, scale_px / step / 3)
    white = rng.standard_normal(coarse, dtype=np.float32) * np.float32(2.0 * math.sqrt(math.pi) * sigma)
    field = cv2.GaussianBlur(white, (0, 0), sigma)
    if step > 1:
        field = cv2.resize(field, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(field[step : step + shape[0], step : step + shape[1]], dtype=np.float32)


def noise_tile(rng: np.random.Generator, sigma_px: float, side: int = TILE_PX) -> F32:
    """Periodic noise of unit deviation, `side` pixels square, blurred by `sigma_px`."""
    white = rng.standard_normal((side, side), dtype=np.float32)
    pad = 4 * math.ceil(sigma_px)
    blurred = cv2.GaussianBlur(np.pad(white, pad, mode="wrap"), (0, 0), sigma_px)[pad:-pad, pad:-pad]
    return np.asarray((blurred - blurred.mean()) / blurred.std(), dtype=np.float32)


def curl(rng: np.random.Generator, shape: tuple[int, int], mpp: float, sway_um: float) -> Curl:
    """Curved coordinates of wavy fibres in a random main direction.

    Args:
        rng: source of direction and waves.
        shape: (rows, columns).
        mpp: microns per pixel.
        sway_um: how far fibres bend to the side; 0 gives straight ones.
    """
    step = max(1, round(2.0 / mpp))
    small = (math.ceil(shape[0] / step) + 2, math.ceil(shape[1] / step) + 2)
    step_um = step * mpp
    theta = float(rng.uniform(0, math.pi))
    y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) * step_um for n in small), indexing="ij")
    along = math.cos(theta) * x + math.sin(theta) * y
    across = -math.sin(theta) * x + math.cos(theta) * y
    along = along + 20.0 * smooth_noise(rng, small, 120.0 / step_um)
    across = across + sway_um * smooth_noise(rng, small, 230.0 / step_um)
    across = across + 0.12 * sway_um * smooth_noise(rng, small, 55.0 / step_um)
    gy, gx = np.gradient(across)
    angle = np.arctan2(gx, -gy)  # a quarter turn from the gradient of `across`

    def enlarge(field: F32) -> F32:
        large = cv2.resize(field.astype(np.float32), None, fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
        return np.asarray(large[: shape[0], : shape[1]], dtype=np.float32)

    cos2, sin2 = (
        enlarge(np.cos(2 * angle)),
        enlarge(np.sin(2 * angle)),
    )  # an axis has no head: average 2*angle
    return Curl(enlarge(along), enlarge(across), np.asarray(0.5 * np.arctan2(sin2, cos2), dtype=np.float32))


def fibre_noise(tile: F32, field: Curl, long_um: float, wide_um: float, shift: float = 0.0) -> F32:
    """Noise drawn out along the fibres: features `long_um` by `wide_um`, sampled from a periodic `tile`.

    The tile's own features are taken to be 3 pixels wide (`noise_tile(rng, 1.5)`); `shift` picks another
    part.
    """
    side = np.float32(tile.shape[0])
    u = np.mod(field.along * np.float32(3.0 / long_um) + np.float32(shift), side)
    v = np.mod(field.across * np.float32(3.0 / wide_um) + np.float32(1.7 * shift), side)
    padded = np.pad(tile, ((0, 2), (0, 2)), mode="wrap")
    return np.asarray(cv2.remap(padded, u, v, cv2.INTER_LINEAR), dtype=np.float32)
