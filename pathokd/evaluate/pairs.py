"""The same tissue under two conditions: which tiles of two registered slides show one place.

Slides of one case count as registered when the same microns are the same tissue, whatever their pixel size.
"""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.spatial import cKDTree

from pathokd.data.places import (
    TOLERANCE,
    case_names,
    centre_um,
    check_one_slide,
    place_ids,
    require_columns,
    tile_um,
)
from pathokd.evaluate.paired_set import check_named
from pathokd.types import FloatArray, IntArray

__all__ = ["RegisteredPair", "match_places", "place_ids", "registered_pairs", "require_columns"]


class RegisteredPair(NamedTuple):
    """Two conditions and the rows that show the same places under each."""

    held: str
    """The value of the column that does not vary, say the staining."""
    first: str
    second: str
    rows_first: npt.NDArray[np.int64]
    """(n,) rows of the table under the first condition."""
    rows_second: npt.NDArray[np.int64]
    """(n,) rows of the same places under the second."""


def registered_pairs(frame: pd.DataFrame, vary: str, hold: str, case_column: str = "case") -> list[RegisteredPair]:
    """Every pair of values of `vary` under the same value of `hold`, with the tiles they have in common.

    Args:
        frame: Manifest or packed index.
        vary: The condition that differs, say `scanner`.
        hold: The condition that stays, say `stain`.
        case_column: The column whose equal values are registered with each other.

    Returns:
        One entry per pair of conditions that share at least two places; cases are pooled.

    Raises:
        ManifestError: A column is missing, a condition is empty in some rows, or a case has two slides under
            one condition.
    """
    require_columns(frame, (vary, hold, case_column, "x", "y", "mpp", "mpp_level0", "tile_px"))
    for name in (vary, hold):
        check_named(frame, name, "The tiles")
    check_one_slide(frame, case_column, (hold, vary))
    position, side = centre_um(frame), tile_um(frame)
    columns = (frame[hold].astype(str), case_names(frame, case_column), frame[vary].astype(str))
    keys = zip(*columns, strict=True)
    found: dict[tuple[str, ...], list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    rows = {key: np.asarray(numbers) for key, numbers in found.items()}
    pairs = []
    for held in sorted({key[0] for key in rows}):
        cases = sorted({key[1] for key in rows if key[0] == held})
        values = sorted({key[2] for key in rows if key[0] == held})
        for first, second in itertools.combinations(values, 2):
            matched = [
                match_places(position, side, rows[held, case, first], rows[held, case, second])
                for case in cases
                if (held, case, first) in rows and (held, case, second) in rows
            ]
            if sum(len(a) for a, _ in matched) >= 2:
                a, b = (np.concatenate(part) for part in zip(*matched, strict=True))
                pairs.append(RegisteredPair(held, first, second, a, b))
    return pairs


def match_places(
    position: FloatArray, side: FloatArray, rows_a: IntArray, rows_b: IntArray
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of two slides that are each other's nearest and closer than the tolerance.

    Args:
        position: (n, 2) microns, of the whole table.
        side: (n,) side of each tile in microns.
        rows_a: Rows of one slide.
        rows_b: Rows of the other.

    Returns:
        Matching rows, two arrays of one length.
    """
    _, to_b = cKDTree(position[rows_b]).query(position[rows_a])
    _, to_a = cKDTree(position[rows_a]).query(position[rows_b])
    mutual = np.flatnonzero(to_a[to_b] == np.arange(len(rows_a)))
    a, b = rows_a[mutual], rows_b[to_b[mutual]]
    near = np.linalg.norm(position[a] - position[b], axis=1) <= TOLERANCE * np.minimum(side[a], side[b])
    return a[near].astype(np.int64), b[near].astype(np.int64)
