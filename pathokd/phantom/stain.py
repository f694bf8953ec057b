"""Stainings: which light each dye takes away, and how strongly a laboratory dyes."""

import math
from dataclasses import dataclass

import numpy as np

from pathokd.phantom.noise import F32
from pathokd.phantom.scene import Scene

Vector = tuple[float, float, float]
"""Optical densities in red, green and blue; used at unit length."""

RUIFROK_H: Vector = (0.650, 0.704, 0.286)
"""Haematoxylin of Ruifrok and Johnston 2001, "Quantification of histochemical staining by color
deconvolution"."""
RUIFROK_E: Vector = (0.072, 0.990, 0.105)
"""Eosin of the same paper."""
BLOOD: Vector = (0.13, 0.78, 0.55)
"""Red cells in H&E: eosin on haemoglobin, whose Soret band takes the blue as well; set by eye."""
DISPLAY_GAMMA = 2.2
"""Concentrations are stated as densities on a display; in linear light they are this many times larger."""


@dataclass(frozen=True)
class Staining:
    """One laboratory's H&E.

    The dye vectors are Ruifrok's plus an offset. As published, eosin (a pure green absorber) renders magenta
    and haematoxylin royal blue; in most archives both also take blue light, about half as much as green.

    Attributes:
        name: used in file names.
        h_offset: added to `RUIFROK_H` before scaling to unit length.
        e_offset: added to `RUIFROK_E` likewise.
        h_gain: strength of haematoxylin, 1 is typical.
        e_gain: strength of eosin.
        h_contrast: exponent on haematoxylin uptake: over 1 is well differentiated (clear cytoplasm, dark
            nuclei), under 1 over-stained.
        h_haze: haematoxylin that stays where eosin is, as a part of it (blue cytoplasm, purple stroma).
    """

    name: str
    h_offset: Vector = (-0.06, 0.05, 0.11)
    e_offset: Vector = (0.1, -0.17, 0.37)
    h_gain: float = 1.0
    e_gain: float = 1.0
    h_contrast: float = 1.0
    h_haze: float = 0.0

    def __post_init__(self) -> None:
        for field in ("h_gain", "e_gain", "h_contrast"):
            value = getattr(self, field)
            if not 0.1 <= value <= 4.0:
                raise ValueError(f"{field} must lie in 0.1 to 4, got {value}: 1 is a typical staining.")

    @property
    def matrix(self) -> F32:
        """Unit dye vectors as rows (haematoxylin, eosin, blood), shape (3, 3)."""
        rows = [np.add(RUIFROK_H, self.h_offset), np.add(RUIFROK_E, self.e_offset), np.array(BLOOD)]
        return np.stack([row / math.sqrt(float((row**2).sum())) for row in rows]).astype(np.float32)


STAININGS: dict[str, Staining] = {
    s.name: s
    for s in (
        Staining("HE", h_gain=1.12),
        Staining("H-strong", h_offset=(0.0, 0.03, 0.1), h_gain=1.35, e_gain=0.85, h_contrast=0.92, h_haze=0.12),
        Staining("E-strong", h_offset=(-0.04, 0.02, 0.17), e_offset=(0.08, -0.17, 0.43), h_gain=0.9, e_gain=1.35),
        Staining("pale", e_offset=(0.07, -0.14, 0.3), h_gain=0.62, e_gain=0.6, h_contrast=1.1),
        Staining("violet", h_offset=(-0.12, 0.1, 0.06), e_offset=(0.16, -0.1, 0.24), h_gain=1.1, h_haze=0.18),
        Staining("blue", h_offset=(0.08, -0.03, 0.02), e_offset=(0.06, -0.15, 0.32), h_gain=1.1, e_gain=0.75),
    )
}
"""Named stainings, a ladder of strength and tint in the spirit of PLISM's thirteen (Ochi et al. 2024).

The numbers were set by eye against public tiles.
"""


def get_staining(name: str | Staining) -> Staining:
    """A staining by name (or itself)."""
    if isinstance(name, Staining):
        return name
    if name not in STAININGS:
        raise ValueError(f"staining must be one of {', '.join(STAININGS)}, got {name!r}: choose one of these.")
    return STAININGS[name]


def transmit(scene: Scene, staining: Staining) -> list[F32]:
    """Light that passes the stained section, in linear light.

    Beer-Lambert: T = 10^-(C M), with concentrations C of the dyes and their vectors M.

    Returns:
        Three planes (red, green, blue) on the scene's grid, values in (0, 1].
    """
    h = scene.haematoxylin if staining.h_contrast == 1.0 else scene.haematoxylin**staining.h_contrast
    h = h * np.float32(staining.h_gain) + np.float32(staining.h_haze) * scene.eosin
    e = scene.eosin * np.float32(staining.e_gain)
    vectors = staining.matrix * np.float32(DISPLAY_GAMMA * math.log(10.0))
    return [
        np.asarray(np.exp(-(h * vectors[0, c] + e * vectors[1, c] + scene.blood * vectors[2, c])), dtype=np.float32)
        for c in range(3)
    ]
