"""How an image is stained: its stain vectors and their strengths, found in it or, where that cannot be, said to be the
reference's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathokd.augment.stain_math import GLASS_OD, REFERENCE, Appearance, Vectors, basis_of, to_od
from pathokd.types import Rgb

REFERENCE_STRENGTH = (1.9705, 1.0308)
"""99th percentiles of the concentrations of the same reference."""

MAX_PIXELS = 8_000
"""Pixels looked at to find stain vectors."""
MIN_TISSUE_PX = 400
MIN_TISSUE_SHARE = 0.02
MIN_ANGLE = math.radians(6.0)
"""Between haematoxylin and eosin; real pairs are 15 to 35 degrees apart."""
MAX_TILT = math.radians(28.0)
"""A vector further from the reference than this is pen, ink, blood or another stain."""
STRENGTH_RANGE = (0.1, 5.0)
"""Of both stains; vectors found in a tile of one cell type can be so close that amounts along them explode."""

BROWN_RED = 0.17
"""Red in the unit vector of a brown, between that of yellow H&E (.06) and of DAB (.27)."""


class StainBasis(NamedTuple):
    """Stain vectors and where they come from."""

    vectors: Vectors
    fallback: str = ""
    """Why the image's own vectors could not be found and the reference stands in; empty if they were."""


def macenko_basis(rgb: Rgb, *, percentile: float = 1.0) -> StainBasis:
    """Stain vectors by Macenko's method: the extreme directions in the plane in which tissue pixels lie.

    Args:
        rgb: any number of pixels, (..., 3).
        percentile: of the angles, cut off on both sides.

    Returns:
        The vectors; the reference, flagged, for tiles that are blank, of one colour, or not stained with H&E.

    Reference:
        Macenko et al. 2009, "A method for normalizing histology slides for quantitative analysis", ISBI, section 2. The
        threshold is on the mean OD here, as asking it of every channel loses pure eosin, which lets red pass.
    """
    pixels = tissue_pixels(rgb)
    if pixels is None:
        return StainBasis(REFERENCE, "too little tissue")
    variance, directions = np.linalg.eigh(np.cov(pixels, rowvar=False))
    if variance[1] < 1e-5:
        return StainBasis(REFERENCE, "one colour only")
    plane = directions[:, [2, 1]]
    plane = plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    along = pixels @ plane
    angle = np.arctan2(along[:, 1], along[:, 0])
    low, high = np.percentile(angle, [percentile, 100 - percentile])
    return _checked(*(plane @ np.array([math.cos(a), math.sin(a)]) for a in (low, high)))


def vahadane_basis(rgb: Rgb, *, sparsity: float = 0.1, seed: int = 0) -> StainBasis:
    """Stain vectors by sparse non-negative factorisation of OD, with scikit-learn's dictionary learning.

    Slow (tens of milliseconds to seconds): meant for a slide or a set of tiles, not for every tile of a training.

    Args:
        rgb: any number of pixels, (..., 3).
        sparsity: weight of the L1 penalty on concentrations.
        seed: of the pixels drawn and of the solver.

    Returns:
        As `macenko_basis`.

    Reference:
        Vahadane et al. 2016, "Structure-preserving color normalization and sparse stain separation for histological
        images", IEEE TMI 35, equation 4.
    """
    from sklearn.decomposition import MiniBatchDictionaryLearning

    pixels = tissue_pixels(rgb)
    if pixels is None:
        return StainBasis(REFERENCE, "too little tissue")
    if np.linalg.eigvalsh(np.cov(pixels, rowvar=False))[1] < 1e-5:
        return StainBasis(REFERENCE, "one colour only")
    drawn = np.random.default_rng(seed).permutation(len(pixels))[:4000]
    solver = MiniBatchDictionaryLearning(
        n_components=2,
        alpha=sparsity,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        positive_code=True,
        positive_dict=True,
        dict_init=REFERENCE[:2].copy(),
        random_state=seed,
        max_iter=50,
    )
    return _checked(*solver.fit(pixels[drawn]).components_)


def measure_appearance(tiles: Sequence[Rgb] | Rgb, vectors: Vectors | None = None) -> Appearance:
    """Stain vectors (Macenko's unless given) and strengths of one image or several of one staining.

    Args:
        tiles: one image or a sequence of images, of any sizes; of none nothing can be found.
        vectors: stain vectors to measure the strengths along.

    Returns:
        The appearance; the reference's, flagged, where no stain can be found.
    """
    images = [tiles] if isinstance(tiles, np.ndarray) and tiles.ndim == 3 else list(tiles)
    pooled = np.concatenate([np.empty((0, 3), np.uint8), *(np.asarray(image).reshape(-1, 3) for image in images)])
    basis = macenko_basis(pooled) if vectors is None else StainBasis(vectors)
    pixels = tissue_pixels(pooled)
    if pixels is None or basis.fallback:
        return Appearance(REFERENCE, REFERENCE_STRENGTH, basis.fallback or "too little tissue")
    h, e, _ = np.percentile(pixels @ np.linalg.inv(basis.vectors), 99, axis=0).tolist()
    low, high = STRENGTH_RANGE
    if not (low <= h <= high and low <= e <= high):
        return Appearance(REFERENCE, REFERENCE_STRENGTH, "amounts of stain beyond what sections hold")
    return Appearance(basis.vectors, (h, e))


def is_brown(found: Appearance) -> bool:
    """Whether the second stain is brown, as DAB of immunohistochemistry is, rather than eosin.

    Eosin takes most of green, DAB most of blue and some of red. Of real H&E (ten slides, nine reference
    images, the laboratories of CAMELYON17, 1,200 tiles one by one) none is taken for brown; of four fields with DAB all
    are. H&E with much melanin or haemosiderin was not at hand. Red pen cannot be told from strong eosin so.

    Reference:
        Ruifrok and Johnston 2001, "Quantification of histochemical staining by color deconvolution", Anal. Quant.
        Cytol. Histol. 23, whose vectors of eosin and DAB are (.07, .99, .11) and (.27, .57, .78).
    """
    red, green, blue = found.vectors[1]
    return not found.fallback and bool(blue > green and red > BROWN_RED)


def tissue_pixels(rgb: Rgb) -> npt.NDArray[np.float64] | None:
    """OD of pixels that carry stain, (n, 3), at most `MAX_PIXELS` evenly spread; None if there are too few."""
    flat = np.asarray(rgb).reshape(-1, 3)
    if not len(flat):
        return None
    # Not by a whole step: every 32nd pixel of a tile of 512 lies in one of 16 columns, where blocks of JPEG begin.
    flat = flat[np.linspace(0, len(flat) - 1, min(len(flat), MAX_PIXELS)).astype(np.int64)]
    od = to_od(flat)
    tissue = od[od @ np.full(3, 1 / 3, np.float32) > GLASS_OD[1] / 2]
    if len(tissue) < max(16, min(MIN_TISSUE_PX, len(flat) / 4), MIN_TISSUE_SHARE * len(flat)):
        return None
    return tissue.astype(np.float64)


def _checked(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> StainBasis:
    """Tell haematoxylin (takes more red) from eosin, and refuse what is neither."""
    found = np.maximum(np.stack([one, other]), 0.0)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    if not np.isfinite(found).all() or (norms == 0).any():
        return StainBasis(REFERENCE, "no stain direction")
    found = found / norms
    if found[0, 0] < found[1, 0]:
        found = found[::-1]
    if _angle(found[0], found[1]) < MIN_ANGLE:
        return StainBasis(REFERENCE, "one stain only")
    tilts = [_angle(vector, reference) for vector, reference in zip(found, REFERENCE[:2], strict=True)]
    if max(tilts) > MAX_TILT:
        return StainBasis(REFERENCE, "colours are not those of haematoxylin and eosin")
    return StainBasis(basis_of(found[0].tolist(), found[1].tolist()))


def _angle(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return math.acos(float(np.clip(a @ b, -1.0, 1.0)))
