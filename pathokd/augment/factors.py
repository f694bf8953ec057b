"""Scanner factors of graded severity: light, optics, sensor, colour processing and compression, one at a time.

Severity runs from 0, where every factor returns the image bit by bit, to 1, the strongest that scanners in use
plausibly show. A seed draws the direction of a change (which way colours lean, the pattern of noise); severity only
moves the image along it, so that for one seed the distance to the original grows with severity.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import albumentations as A
import numpy as np

from pathokd.augment import optics_math as optics
from pathokd.augment.ranges import checked_severity, ordered_range
from pathokd.types import Rgb


@dataclass(frozen=True)
class Factor:
    """One thing in which scanners differ.

    Args:
        name: for tables and commands.
        at_most: what severity 1 means, in physical units.
        change: from image, severity in (0, 1] and a generator to the changed image.
    """

    name: str
    at_most: str
    change: Callable[[Rgb, float, np.random.Generator], Rgb]

    def apply(self, rgb: Rgb, severity: float, seed: int) -> Rgb:
        """Change an image.

        Args:
            rgb: uint8 (height, width, 3).
            severity: 0 (nothing) to 1.
            seed: of direction and noise.

        Returns:
            A new image.
        """
        image = optics.check_rgb(rgb)
        if checked_severity(severity) == 0:
            return image.copy()
        return self.change(image, severity, np.random.default_rng([seed, zlib.crc32(self.name.encode())]))


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _illuminant(rgb: Rgb, s: float, rng: np.random.Generator) -> Rgb:
    return optics.illuminant(rgb, 60.0 * s * _sign(rng))


def _white_balance(rgb: Rgb, s: float, rng: np.random.Generator) -> Rgb:
    lean = rng.standard_normal(3)
    lean -= lean.mean()  # brightness is another matter
    return optics.white_balance(rgb, np.exp(0.15 * s * lean / np.linalg.norm(lean)))


def _colour_matrix(rgb: Rgb, s: float, rng: np.random.Generator) -> Rgb:
    angle = rng.uniform(0, 2 * np.pi)
    hue, saturation = 10.0 * s * np.cos(angle), np.exp(0.3 * s * np.sin(angle))
    return optics.colour_matrix(rgb, optics.hue_saturation(hue, float(saturation)))


def _noise(rgb: Rgb, s: float, rng: np.random.Generator) -> Rgb:
    return optics.sensor_noise(rgb, 5.0 * s, 0.0, rng)


def _chromatic(rgb: Rgb, s: float, rng: np.random.Generator) -> Rgb:
    angle = rng.uniform(0, 2 * np.pi)
    return optics.chromatic_shift(rgb, 0.8 * s * np.cos(angle), 0.8 * s * np.sin(angle))


def _jpeg(rgb: Rgb, s: float, rng: np.random.Generator) -> Rgb:
    # A tile's corner is not the slide's: the grid of blocks lies anywhere under it.
    left, top = rng.integers(0, 16, 2)
    return optics.jpeg(rgb, optics.jpeg_quality_at(30, s), (int(left), int(top)))


FACTORS: dict[str, Factor] = {
    factor.name: factor
    for factor in (
        # In physical order: light, optics, sensor, colour processing, compression.
        Factor("illuminant", "60 mired warmer or colder, white balanced by three quarters", _illuminant),
        Factor(
            "white balance", "gains of linear light off by 15 % along a direction that keeps their mean", _white_balance
        ),
        Factor("psf blur", "Gaussian of 1.4 px", lambda x, s, _: optics.gaussian_blur(x, 1.4 * s)),
        Factor("defocus", "disc of confusion of radius 2 px", lambda x, s, _: optics.defocus(x, 2.0 * s)),
        Factor("chromatic shift", "red and blue 0.8 px either way of green", _chromatic),
        Factor(
            "resampling", "5 % larger or smaller pixels", lambda x, s, r: optics.resample(x, 1 + 0.05 * s * _sign(r))
        ),
        Factor("shot noise", "5 steps of 255 at full light", _noise),
        Factor("read noise", "3 steps of 255 everywhere", lambda x, s, r: optics.sensor_noise(x, 0.0, 3.0 * s, r)),
        Factor("colour matrix", "10 degrees of hue, or 35 % more or 26 % less saturation", _colour_matrix),
        Factor("gamma", "exponent 1.28 or 0.78", lambda x, s, r: optics.gamma(x, float(np.exp(0.25 * s * _sign(r))))),
        Factor("tone curve", "contrast 0.6 more or less", lambda x, s, r: optics.tone_curve(x, 0.6 * s * _sign(r))),
        Factor("sharpening", "unsharp mask of 1 px by 1.6", lambda x, s, _: optics.unsharp_mask(x, 1.6 * s)),
        Factor("jpeg", "quality 30, blocks beginning anywhere", _jpeg),
        Factor("jpeg 2000", "root mean square error of 5 steps", lambda x, s, _: optics.jpeg2000(x, 5.0 * s)),
    )
}
"""Every factor by name."""

DEFAULT_PROBABILITIES: dict[str, float] = {
    "illuminant": 0.3,
    "white balance": 0.4,
    "psf blur": 0.25,
    "defocus": 0.15,
    "chromatic shift": 0.15,
    "shot noise": 0.2,
    "read noise": 0.1,
    "colour matrix": 0.5,
    "gamma": 0.5,
    "tone curve": 0.4,
    "sharpening": 0.25,
    "jpeg": 0.4,
}
"""How often `ScannerJitter` draws each factor. Resampling is left out, as it moves tissue from patch to patch, and JPEG
2000, as it is slow."""


class ScannerJitter(A.ImageOnlyTransform):
    """Another scanner at random: each factor with its probability, in the order in which light meets them.

    Args:
        severity: range that the severity of each drawn factor is uniform in.
        factors: probability of each factor by name; `DEFAULT_PROBABILITIES` by default.
        p: probability.
    """

    def __init__(
        self, severity: tuple[float, float] = (0.0, 0.5), factors: dict[str, float] | None = None, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.severity = ordered_range("severity", severity)
        for end in self.severity:
            checked_severity(end)
        self.factors = factors
        chosen = DEFAULT_PROBABILITIES if factors is None else factors
        unknown = [name for name in chosen if name not in FACTORS]
        if unknown:
            raise ValueError(f"there is no scanner factor {unknown[0]!r}: choose from {', '.join(FACTORS)}.")
        self._probabilities = [(name, chosen[name]) for name in FACTORS if name in chosen]

    def get_params(self) -> dict[str, Any]:
        """Draw factors, their severities and a seed."""
        draw = self.py_random
        drawn = [
            (name, draw.uniform(*self.severity))
            for name, probability in self._probabilities
            if draw.random() < probability
        ]
        return {"drawn": drawn, "scanner_seed": draw.getrandbits(31)}

    def apply(self, img: Rgb, drawn: Sequence[tuple[str, float]], scanner_seed: int, **params: Any) -> Rgb:
        """Scan one image anew."""
        image = img.copy() if not drawn else img
        for name, severity in drawn:
            image = FACTORS[name].apply(image, severity, scanner_seed)
        return image
