"""Staining as albumentations transforms: other amounts of the same dyes, other dyes, other laboratories.

All of them are one affine map of optical density per tile, leave glass untouched, and are the identity at zero
strength. Randomness lives in `get_params`; `apply` is pure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np

from pathokd.augment.ranges import Range, ordered_range, positive_range
from pathokd.augment.stain_basis import macenko_basis, measure_appearance, tissue_pixels
from pathokd.augment.stain_math import REFERENCE, RUIFROK, Appearance, affine_od, scale_map, swap_map
from pathokd.augment.stainings import STAININGS, get_staining
from pathokd.augment.statistics import StainStatistics
from pathokd.pictures import read_image
from pathokd.types import FloatArray, Rgb


class StainJitter(A.ImageOnlyTransform):
    """More or less haematoxylin and eosin: each stain's amount is scaled and shifted on its own.

    What lies off the two stains (pigment, blood, a scanner's colour) is kept as it is.

    Args:
        scale: range of the factor on the amount of each stain; (1, 1) changes nothing.
        shift: range of what is added to the amount, in optical density (natural logarithm).
        basis: `reference` takes the vectors of a typical H&E for every tile; `macenko` finds the tile's own and takes
            the reference's where it cannot.
        p: probability.

    Reference:
        Tellez et al. 2019, "Quantifying the effects of data augmentation and stain color normalization in convolutional
        neural networks for computational pathology", section 3.2, with H&E vectors in place of HED's.
    """

    def __init__(
        self,
        scale: Range = (0.7, 1.35),
        shift: Range = (-0.06, 0.06),
        basis: Literal["reference", "macenko"] = "reference",
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if basis not in ("reference", "macenko"):
            raise ValueError(f"basis must be reference or macenko, got {basis!r}.")
        self.scale, self.shift, self.basis = positive_range("scale", scale), ordered_range("shift", shift), basis

    def get_params(self) -> dict[str, Any]:
        """Draw a factor and a shift per stain."""
        draw = self.py_random.uniform
        return {
            "stain_scale": np.array([draw(*self.scale), draw(*self.scale), 1.0]),
            "stain_shift": np.array([draw(*self.shift), draw(*self.shift), 0.0]),
        }

    def apply(self, img: Rgb, stain_scale: FloatArray, stain_shift: FloatArray, **params: Any) -> Rgb:
        """Restain one image."""
        vectors = REFERENCE if self.basis == "reference" else macenko_basis(img).vectors
        return affine_od(img, *scale_map(vectors, stain_scale, stain_shift))


class HEDJitter(A.ImageOnlyTransform):
    """The HED augmentation: amounts of haematoxylin, eosin and DAB, by Ruifrok's vectors, scaled and shifted.

    Args:
        scale: range of the factor on each amount.
        shift: range of what is added to each amount, in optical density (natural logarithm).
        p: probability.

    Reference:
        Tellez et al. 2018, "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train
        distilled stain-invariant convolutional networks", IEEE TMI 37.
    """

    def __init__(self, scale: Range = (0.95, 1.05), shift: Range = (-0.05, 0.05), p: float = 1.0) -> None:
        super().__init__(p=p)
        self.scale, self.shift = positive_range("scale", scale), ordered_range("shift", shift)

    def get_params(self) -> dict[str, Any]:
        """Draw a factor and a shift per stain."""
        draw = self.py_random.uniform
        return {
            "stain_scale": np.array([draw(*self.scale) for _ in range(3)]),
            "stain_shift": np.array([draw(*self.shift) for _ in range(3)]),
        }

    def apply(self, img: Rgb, stain_scale: FloatArray, stain_shift: FloatArray, **params: Any) -> Rgb:
        """Restain one image."""
        return affine_od(img, *scale_map(RUIFROK, stain_scale, stain_shift))


class StainSwap(A.ImageOnlyTransform):
    """The same tissue as another laboratory would have stained it.

    Args:
        stainings: names in `pathokd.augment.STAININGS` or paths of reference images; all of the former by default.
        strength: range of how far to go, 0 (nothing) to 1 (the target's dyes and amounts).
        source: a staining's name or an image's path where it is known how the tiles are stained; by default each
            tile is measured, which a tile of a single cell type misleads.
        p: probability.
    """

    def __init__(
        self,
        stainings: Sequence[str] | None = None,
        strength: Range = (0.5, 1.0),
        source: str | None = None,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.stainings = None if stainings is None else list(stainings)
        self.strength = ordered_range("strength", strength)
        if not 0 <= self.strength[0] <= self.strength[1] <= 1:
            raise ValueError(f"strength must lie within 0 to 1, got {strength}.")
        self.source = source
        self._targets_measured = [staining_or_image(name) for name in self.stainings or list(STAININGS)]
        self._source_measured = None if source is None else staining_or_image(source)

    def get_params(self) -> dict[str, Any]:
        """Draw a target and a strength."""
        return {
            "target": self.py_random.randrange(len(self._targets_measured)),
            "swap_strength": self.py_random.uniform(*self.strength),
        }

    def apply(self, img: Rgb, target: int, swap_strength: float, **params: Any) -> Rgb:
        """Restain one image."""
        source = self._source_measured or measure_appearance(img)
        return swap_stain(img, source, self._targets_measured[target], swap_strength)


class RandStainNA(A.ImageOnlyTransform):
    """Normalise each tile to a random member of a cohort, drawn from the cohort's statistics.

    Args:
        statistics: YAML file of `pathokd stain-stats`.
        strength: range of how far to go, 0 (nothing) to 1 (the drawn mean and spread).
        spread: factor on the cohort's standard deviations; 0 normalises every tile to the cohort's mean.
        p: probability.

    Reference:
        Shen et al. 2022, "RandStainNA: Learning Stain-Agnostic Features from Histology Slides by Bridging Stain
        Augmentation and Normalization", MICCAI, section 2, here in the space of stain amounts, where it is lossless.
    """

    def __init__(self, statistics: str, strength: Range = (1.0, 1.0), spread: float = 1.0, p: float = 1.0) -> None:
        super().__init__(p=p)
        if not spread >= 0:
            raise ValueError(f"spread must not be negative, got {spread}.")
        self.statistics, self.spread = statistics, spread
        self.strength = ordered_range("strength", strength)
        if not 0 <= self.strength[0] <= self.strength[1] <= 1:
            raise ValueError(f"strength must lie within 0 to 1, got {strength}.")
        self._cohort = StainStatistics.load(statistics)

    def get_params(self) -> dict[str, Any]:
        """Draw a mean and a spread of each stain's amount."""
        mean, sd = self._cohort.draw(self.random_generator, self.spread)
        return {"mean": mean, "sd": sd, "swap_strength": self.py_random.uniform(*self.strength)}

    def apply(self, img: Rgb, mean: FloatArray, sd: FloatArray, swap_strength: float, **params: Any) -> Rgb:
        """Restain one image; one with too little tissue stays as it is."""
        vectors = self._cohort.vectors
        pixels = tissue_pixels(img)
        if pixels is None:
            return img.copy()
        amounts = pixels @ np.linalg.inv(vectors)
        own_mean, own_sd = amounts.mean(axis=0), np.maximum(amounts.std(axis=0), 1e-3)
        # A tile of one tissue is less varied than its cohort; stretching it far would invent contrast.
        factor = np.clip(sd / own_sd, 0.5, 2.0)
        scale = 1 + swap_strength * (factor - 1)
        shift = swap_strength * (mean - own_mean * factor)
        return affine_od(img, *scale_map(vectors, scale, shift))


def swap_stain(rgb: Rgb, source: Appearance, target: Appearance, strength: float = 1.0) -> Rgb:
    """Restain an image from one appearance to another.

    Args:
        rgb: (height, width, 3).
        source: how it is stained.
        target: how it should be.
        strength: 0 returns the image, 1 the full change.
    """
    return affine_od(rgb, *swap_map(source, target, strength))


def staining_or_image(name: str) -> Appearance:
    """The appearance called `name`, or that of the image at this path.

    Raises:
        ValueError: neither a staining nor an image, or an image without H&E.
    """
    if name in STAININGS or not Path(name).suffix:
        return get_staining(name)
    measured = measure_appearance(read_image(name))
    if measured.fallback:
        raise ValueError(f"{name} cannot serve as a reference of staining: {measured.fallback}; take another image.")
    return measured
