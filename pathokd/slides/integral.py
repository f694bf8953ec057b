"""Exact sums over boxes with fractional borders."""

import numpy as np
import numpy.typing as npt

from pathokd.types import FloatArray


def integral(image: npt.NDArray[np.bool_] | FloatArray) -> npt.NDArray[np.float64]:
    """Integral image (summed-area table): entry (r, c) is the sum of `image[:r, :c]`.

    Args:
        image: shape (height, width).

    Returns:
        shape (height + 1, width + 1).
    """
    table = np.zeros((image.shape[0] + 1, image.shape[1] + 1))
    np.cumsum(image, axis=0, out=table[1:, 1:], dtype=np.float64)
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table


def box_sums(
    table: npt.NDArray[np.float64], left: FloatArray, top: FloatArray, width: float, height: float
) -> npt.NDArray[np.float64]:
    """Sum of a piecewise constant image over boxes with real-valued borders.

    The integral of a piecewise constant function is bilinear within each pixel, so interpolating the table at
    the four corners is exact. Parts outside the image count as 0.

    Args:
        table: from `integral`.
        left: left borders in pixels, shape (n,).
        top: top borders in pixels, shape (n,).
        width: of every box, in pixels.
        height: of every box, in pixels.

    Returns:
        shape (n,).
    """
    right, bottom = left + width, top + height
    sums = _at(table, right, bottom) - _at(table, left, bottom) - _at(table, right, top) + _at(table, left, top)
    return np.maximum(sums, 0.0)


def _at(table: npt.NDArray[np.float64], x: FloatArray, y: FloatArray) -> npt.NDArray[np.float64]:
    """Bilinear look-up, held constant outside."""
    rows, columns = table.shape
    x, y = np.clip(x, 0, columns - 1), np.clip(y, 0, rows - 1)
    column = np.minimum(x.astype(np.intp), max(columns - 2, 0))
    row = np.minimum(y.astype(np.intp), max(rows - 2, 0))
    fx, fy = x - column, y - row
    right, below = np.minimum(column + 1, columns - 1), np.minimum(row + 1, rows - 1)
    upper = table[row, column] * (1 - fx) + table[row, right] * fx
    lower = table[below, column] * (1 - fx) + table[below, right] * fx
    out: npt.NDArray[np.float64] = upper * (1 - fy) + lower * fy
    return out
