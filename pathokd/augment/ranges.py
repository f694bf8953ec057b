"""Arguments of transforms, checked where they come in."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Range = tuple[float, float]


def checked_severity(severity: float) -> float:
    """`severity` itself.

    Raises:
        ValueError: outside 0 to 1.
    """
    if not 0 <= severity <= 1:
        raise ValueError(f"severity must lie within 0 to 1, got {severity}.")
    return severity


def finite(values: Any) -> bool:
    """Whether a number, or all of several, is neither NaN nor infinite nor a word: YAML reads `.nan` as a number."""
    array = np.asarray(values)
    return bool(array.dtype.kind in "iuf" and np.isfinite(array).all())


def ordered_range(name: str, values: Sequence[float]) -> Range:
    """`values` as (low, high).

    Raises:
        ValueError: not two numbers in order.
    """
    if len(values) != 2 or not values[0] <= values[1]:
        raise ValueError(f"{name} must be a range [low, high], got {list(values)}.")
    return float(values[0]), float(values[1])


def positive_range(name: str, values: Sequence[float]) -> Range:
    """As `ordered_range`, for factors.

    Raises:
        ValueError: also where a factor is not above 0.
    """
    low, high = ordered_range(name, values)
    if low <= 0:
        raise ValueError(f"{name} must be above 0, got {list(values)}.")
    return low, high
