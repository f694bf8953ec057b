"""Which pyramid level to read, and which of its pixels, for a tile asked for in microns per pixel."""

import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL_TOLERANCE = 0.02
"""A level this close to the asked downsample (relative) counts as a match."""


class LevelChoice(NamedTuple):
    """A pyramid level and how many of its pixels make one output pixel."""

    level: int
    scale: float
    """Level pixels per output pixel: 1 is a match, above 1 the level is shrunk, below 1 it is enlarged."""


class ReadWindow(NamedTuple):
    """What to read from a level and how to turn it into the output."""

    size: tuple[int, int]
    """Width and height to read, in level pixels."""
    resize: bool
    """False: the pixels are the output as they are. True: resample by exactly `1 / scale`, then crop to the
    output."""


def choose_level(
    level_downsamples: Sequence[float], downsample: float, tolerance: float = LEVEL_TOLERANCE
) -> LevelChoice:
    """Choose the coarsest level that need not be enlarged to reach `downsample`.

    Everything stays in floats: a level with downsample 3.9994 serves a request for 4.0 with scale 1.00015, it
    is not taken for 3. If even level 0 is too coarse, level 0 is returned with a scale below `1 / (1 +
    tolerance)`; refusing or enlarging is the caller's decision (see `is_upsampling`).

    Args:
        level_downsamples: level-0 pixels per level pixel, for each level, in any order.
        downsample: level-0 pixels per output pixel, above 0.
        tolerance: how much coarser than asked a level may be and still count as a match, relative.

    Raises:
        ValueError: no levels, or a downsample that is not a positive number.
    """
    if not level_downsamples:
        raise ValueError("level_downsamples is empty: expected one value per pyramid level")
    if not (math.isfinite(downsample) and downsample > 0):
        raise ValueError(f"downsample must be a positive number, got {downsample!r}")
    fitting = [i for i, d in enumerate(level_downsamples) if d <= downsample * (1 + tolerance)]
    if fitting:
        level = max(fitting, key=lambda i: level_downsamples[i])
    else:
        level = min(range(len(level_downsamples)), key=lambda i: level_downsamples[i])
    return LevelChoice(level, downsample / level_downsamples[level])


def is_upsampling(scale: float, tolerance: float = LEVEL_TOLERANCE) -> bool:
    """True if reading at `scale` level pixels per output pixel invents detail beyond the tolerance."""
    return scale * (1 + tolerance) < 1


def read_window(scale: float, out_size: tuple[int, int]) -> ReadWindow:
    """Pixels of a level that cover an output of `out_size` pixels at `scale` level pixels per output pixel.

    When the exact field of view rounds to the output size itself (off by less than half a pixel over the
    whole width and height) the level's pixels are taken as they are, which keeps a match free of blur.
    Otherwise the window is the exact field of view rounded up, to be resampled by exactly `1 / scale` from
    its top-left corner: rounding then only adds spare pixels on the right and below, and neither shifts nor
    scales the view.
    """
    exact = [pixels * scale for pixels in out_size]
    if all(abs(e - pixels) < 0.5 for e, pixels in zip(exact, out_size, strict=True)):
        return ReadWindow(out_size, resize=False)
    # Enlarging interpolates towards the next pixel, so it needs one more.
    spare = 1 if scale < 1 else 0
    width, height = (math.ceil(e - 1e-6) + spare for e in exact)
    return ReadWindow((width, height), resize=True)
