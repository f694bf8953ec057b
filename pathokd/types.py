"""Units and array aliases, so that signatures say what a number means."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Mpp: TypeAlias = float
"""Microns per pixel."""
Microns: TypeAlias = float
SlidePx: TypeAlias = int
"""A coordinate or length in level-0 pixels of a slide."""
LevelPx: TypeAlias = int
"""A coordinate or length in pixels of some pyramid level."""

Rgb: TypeAlias = npt.NDArray[np.uint8]
"""An 8-bit sRGB image, shape (height, width, 3)."""
Mask: TypeAlias = npt.NDArray[np.bool_]
"""A boolean image, shape (height, width)."""
FloatArray: TypeAlias = npt.NDArray[np.floating]
"""Floating-point values of any precision."""
IntArray: TypeAlias = npt.NDArray[np.integer]
"""Integers of any width."""
