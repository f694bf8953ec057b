"""Features as colours: three principal axes as red, green and blue, the same for every slide they were fitted on."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pathokd.types import FloatArray, Mask

PERCENTILES = (2.0, 98.0)
"""What becomes 0 and 255: a few odd tiles (pen, folds) must not flatten the rest."""
_BLOCK = 4096
"""Tiles computed on at a time in double precision, which takes two to four times the memory of what is stored."""


class ColourSpace(NamedTuple):
    """Where features lie on three axes, and how that becomes a colour."""

    mean: npt.NDArray[np.float64]
    """(d,)."""
    axes: npt.NDArray[np.float64]
    """(3, d) unit vectors by falling variance; zero where there are fewer than three."""
    low: npt.NDArray[np.float64]
    """(3,) position that becomes 0."""
    high: npt.NDArray[np.float64]
    """(3,) position that becomes 255."""
    share: npt.NDArray[np.float64]
    """(3,) of the variance."""
    n_tiles: int

    def colours(self, features: FloatArray, good: Mask) -> npt.NDArray[np.uint8]:
        """One colour per tile.

        Args:
            features: (n, d).
            good: (n,) tiles that have features; the others are black.

        Returns:
            (n, 3).
        """
        spread = self.high - self.low
        scaled = (self.project(features[good]) - self.low) / np.where(spread > 0, spread, 1)
        scaled[:, spread <= 0] = 0.5  # alike on this axis: neither bright nor dark
        out = np.zeros((len(features), 3), np.uint8)
        out[good] = np.clip(np.round(255 * scaled), 0, 255)
        return out

    def project(self, features: FloatArray) -> npt.NDArray[np.float64]:
        """Positions on the axes, (n, 3)."""
        out = np.empty((len(features), 3))
        for start in range(0, len(features), _BLOCK):
            block = np.asarray(features[start : start + _BLOCK], np.float64)
            out[start : start + _BLOCK] = (block - self.mean) @ self.axes.T
        return out


def fit_colours(parts: Callable[[], Iterable[FloatArray]]) -> ColourSpace:
    """Principal axes and percentiles over all tiles, in two passes; keeps one part and 12 bytes of every tile.

    The sign of an axis is free; the entry of largest magnitude is made positive, so that a picture repeats.

    Args:
        parts: Called twice; each time yields the features of the same tiles, arrays (n, d) of finite numbers.

    Returns:
        The space.

    Raises:
        ValueError: There is not one tile.
    """
    count, shift = 0, np.zeros(0)
    total, product = np.zeros(0), np.zeros((0, 0))
    for x in _blocks(parts()):
        if not count:
            # Sums are taken about the first block's mean: about zero they would cancel where the mean is large.
            shift, total, product = x.mean(axis=0), np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        centred = x - shift
        count, total, product = count + len(x), total + centred.sum(axis=0), product + centred.T @ centred
    if not count:
        raise ValueError("colours need at least one tile with features, got none.")
    offset = total / count
    covariance = product / count - np.outer(offset, offset)
    values, vectors = np.linalg.eigh(covariance)
    strongest = vectors[:, ::-1][:, :3].T
    rows = np.arange(len(strongest))
    strongest = strongest * np.sign(strongest[rows, np.abs(strongest).argmax(axis=1)])[:, None]
    axes, share = np.zeros((3, len(shift))), np.zeros(3)
    axes[: len(strongest)] = strongest
    variance = np.maximum(values, 0)
    share[: len(strongest)] = variance[::-1][:3] / max(float(variance.sum()), 1e-300)
    space = ColourSpace(shift + offset, axes, np.zeros(3), np.zeros(3), share, count)
    positions, at = np.empty((3, count), np.float32), 0
    for x in _blocks(parts()):
        positions[:, at : at + len(x)] = space.project(x).T
        at += len(x)
    low, high = np.array([np.percentile(axis, PERCENTILES, overwrite_input=True) for axis in positions], np.float64).T
    return space._replace(low=low, high=np.where(share > 0, high, low))


def _blocks(parts: Iterable[FloatArray]) -> Iterator[npt.NDArray[np.float64]]:
    """Tiles of all parts, some at a time, in double precision."""
    for part in parts:
        for start in range(0, len(part), _BLOCK):
            yield np.asarray(part[start : start + _BLOCK], np.float64)
