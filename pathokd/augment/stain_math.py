"""Stain as arithmetic: optical density without loss, stain vectors, concentrations, maps between stainings.

Beer-Lambert: light that passes a stained section falls off exponentially with the amount of dye, so dyes add up in
optical density (OD). A pixel's OD is a row vector `c @ V` of concentrations `c` and unit stain vectors `V` (rows:
haematoxylin, eosin, residual). Every change of staining here is one affine map of OD, which is why it is fast.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pathokd.types import FloatArray, Rgb

Od = npt.NDArray[np.float32]
"""Optical density, natural logarithm, shape (height, width, 3) or (n, 3); 0 is white."""
Vectors = npt.NDArray[np.float64]
"""Unit stain vectors as rows, shape (3, 3): haematoxylin, eosin, and a third that spans what the two leave."""

_TABLE = (-np.log((np.arange(256) + 1) / 256)).astype(np.float32)
GLASS_OD = (0.16, 0.32)
"""Mean OD up to which a pixel is glass, and from which it is fully tissue. Clean glass of real scanners is 0.02 to
0.16."""


def to_od(rgb: Rgb) -> Od:
    """Optical density -ln((I + 1) / 256): finite for black, 0 for white, and undone exactly by `from_od`.

    Args:
        rgb: (height, width, 3) or (n, 3).
    """
    flat = np.ascontiguousarray(rgb)
    return np.asarray(cv2.LUT(flat if flat.ndim == 3 else flat[None], _TABLE), np.float32).reshape(flat.shape)


def from_od(od: Od) -> Rgb:
    """The image of an optical density, rounded and clipped to 0..255; `from_od(to_od(x))` is `x` for every uint8.

    Args:
        od: (height, width, 3) or (n, 3).
    """
    light = cv2.exp(-(od if od.ndim == 3 else od[None]))
    # addWeighted rounds and clips in one pass; the second term has no weight.
    rgb = cv2.addWeighted(light, 256.0, light, 0.0, -1.0, dtype=cv2.CV_8U)
    return np.asarray(rgb, np.uint8).reshape(od.shape)


def affine_od(
    rgb: Rgb,
    matrix: FloatArray,
    offset: FloatArray | None = None,
    limits: FloatArray | None = None,
    *,
    keep_glass: bool = True,
) -> Rgb:
    """Map every pixel's OD to `od @ matrix.T + offset`.

    Args:
        rgb: (height, width, 3).
        matrix: (3, 3).
        offset: (3,); none by default.
        limits: (2, 3), the least and greatest factor of the matrix on each channel's OD, give or take `GLASS_OD[0]`;
            none by default.
        keep_glass: leave pixels whose mean OD is below `GLASS_OD[0]` exactly as they are, and let the change fade in up
            to `GLASS_OD[1]`: staining does not change the glass. A scanner does; pass False for one.

    Returns:
        A new image of the same shape; equal to `rgb` for the identity.
    """
    shift = np.zeros(3) if offset is None else np.asarray(offset, np.float64)
    # Everything below is in -od, so that `exp` needs no sign.
    change = np.column_stack([np.asarray(matrix, np.float64) - np.eye(3), -shift]).astype(np.float32)
    bounds = [] if limits is None else _change_bounds(np.asarray(limits), shift)
    out = np.empty(rgb.shape, np.uint8)
    rows = max(1, _STRIP_PX // rgb.shape[1])
    for top in range(0, len(rgb), rows):
        log_light = np.asarray(cv2.LUT(np.ascontiguousarray(rgb[top : top + rows]), -_TABLE), np.float32)
        delta = cv2.transform(log_light, change)
        for clip, bound in bounds:
            clip(delta, cv2.transform(log_light, bound), dst=delta)
        if keep_glass:
            cv2.multiply(delta, _tissue_weight(log_light), dst=delta)
        cv2.add(log_light, delta, dst=log_light)
        cv2.exp(log_light, dst=log_light)
        cv2.addWeighted(log_light, 256.0, log_light, 0.0, -1.0, dst=out[top : top + rows], dtype=cv2.CV_8U)
    return out


_STRIP_PX = 8192
"""Pixels worked on at a time: their floats stay in the processor's cache, and in memory that need not be handed back to
the system after every call, which costs more than the arithmetic."""


def _change_bounds(limits: FloatArray, shift: FloatArray) -> list[tuple[Callable[..., Any], npt.NDArray[np.float32]]]:
    """Maps from -od to the floor and the ceiling of its change, each with the function that imposes it.

    A pixel may be off the limits by as much as clean glass is off white; only what goes beyond is held back.
    """
    least, greatest = limits
    pairs = [(cv2.max, greatest, -GLASS_OD[0]), (cv2.min, least, GLASS_OD[0])]
    return [(clip, np.column_stack([np.diag(f - 1), slack - shift]).astype(np.float32)) for clip, f, slack in pairs]


def _tissue_weight(log_light: Od) -> Od:
    """0 on glass to 1 on tissue, the same in three channels, from -od; shape of `log_light`."""
    low, high = GLASS_OD
    slope = 1.0 / (high - low)
    ramp = np.full((3, 4), -slope / 3, np.float32)
    ramp[:, 3] = -low * slope
    weight = np.asarray(cv2.transform(log_light, ramp), np.float32)
    return np.clip(weight, 0.0, 1.0, out=weight)


class Appearance(NamedTuple):
    """How a set of tiles is stained."""

    vectors: Vectors
    strength: tuple[float, float]
    """99th percentile of the concentrations of haematoxylin and eosin, in OD along the unit vectors."""
    fallback: str = ""
    """Why it could not be measured and the reference stands in; empty if it was."""


def basis_of(haematoxylin: Sequence[float], eosin: Sequence[float], third: Sequence[float] | None = None) -> Vectors:
    """Unit vectors of two stains and a third, by default the direction across both (which keeps what they leave over).

    Raises:
        ValueError: a vector is zero, or they do not span all colours.
    """
    h, e = np.asarray(haematoxylin, np.float64), np.asarray(eosin, np.float64)
    rows = np.stack([h, e, np.cross(h, e) if third is None else np.asarray(third, np.float64)])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms == 0).any() or abs(np.linalg.det(rows / norms)) < 1e-3:
        raise ValueError(
            f"stain vectors must point in different directions, got {h.tolist()} and {e.tolist()}: "
            "give each stain its own absorbance in red, green and blue."
        )
    return np.asarray(rows / norms)


RUIFROK = basis_of((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
"""Haematoxylin, eosin, DAB of Ruifrok and Johnston 2001, "Quantification of histochemical staining by color
deconvolution", Anal. Quant. Cytol. Histol. 23; the vectors scikit-image's HED uses."""
REFERENCE = basis_of((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581))
"""H&E of the reference image of Veta's implementation of Macenko's method, which torchstain and others carry on."""


def concentrations(rgb: Rgb, vectors: Vectors) -> npt.NDArray[np.float32]:
    """Amounts of the three stains per pixel, same shape as `rgb`; negative where a colour is off the stains.

    Reference:
        Ruifrok and Johnston 2001, colour deconvolution.
    """
    od = to_od(rgb)
    return np.asarray(od @ np.linalg.inv(vectors).astype(np.float32), np.float32)


class OdMap(NamedTuple):
    """A change of staining, as `affine_od` takes it."""

    matrix: FloatArray
    """(3, 3), applied to OD from the left."""
    offset: FloatArray
    """(3,) OD added."""
    limits: FloatArray
    """(2, 3), least and greatest factor on each channel's OD."""


def scale_map(vectors: Vectors, scale: FloatArray, shift: FloatArray) -> OdMap:
    """The affine map of OD that turns concentrations c into `c * scale + shift`.

    Args:
        vectors: (3, 3) stain vectors.
        scale: (3,) factor per stain.
        shift: (3,) OD added per stain.
    """
    scale = np.asarray(scale, np.float64)
    matrix = ((np.linalg.inv(vectors) * scale) @ vectors).T
    return OdMap(matrix, np.asarray(shift @ vectors), _limits(scale[:, None] * np.ones(3)))


def swap_map(source: Appearance, target: Appearance, strength: float = 1.0) -> OdMap:
    """The linear map of OD that restains `source` as `target`: same amounts relative to the strongest, other dyes.

    What lies off the two stains, such as pigment, keeps its amount; where the target is paler it fades as the two do on
    average, or pale eosin would look olive.

    Args:
        source: how it is stained.
        target: how it should be.
        strength: 0 is the identity, 1 the full change.
    """
    haematoxylin, eosin = (t / s for s, t in zip(source.strength, target.strength, strict=True))
    ratio = np.array([haematoxylin, eosin, min(1.0, np.sqrt(haematoxylin * eosin))])
    after = target.vectors * ratio[:, None]
    change = (np.linalg.inv(source.vectors) @ after).T - np.eye(3)
    limits = _limits(after[:2] / np.maximum(source.vectors[:2], 1e-3))
    return OdMap(np.eye(3) + strength * change, np.zeros(3), 1 + strength * (limits - 1))


def _limits(factors: FloatArray) -> FloatArray:
    """Least and greatest change of OD, (2, 3), given the factors by which each dye alone changes it, (dyes, 3).

    A mixture changes by a factor between those of its dyes, and what lies off them stays or fades. Without these limits
    the map would extrapolate: where a scanner saw no red at all, the amounts that explain it are of opposite sign and
    cancel in green and blue, and less of one would turn a dark nucleus into cyan.
    """
    kept = np.vstack([factors, np.ones(3)])
    return np.stack([kept.min(axis=0), kept.max(axis=0)])
