"""Which tiles show one place: slides of a case are registered when the same microns are the same tissue."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.errors import ManifestError

PATIENT_COLUMNS = ("patient_id", "patient", "case_id")
"""Columns that may name patients, most telling first."""
TOLERANCE = 0.05
"""Largest distance of two tiles of one place, as a share of the tile's side."""


@dataclass(frozen=True)
class RegisteredSpec:
    """Which columns say that tiles are registered.

    Args:
        case: slides of one case are registered with each other: the same microns are the same tissue.
        conditions: columns that together name the condition a tile is seen under.
        reference: a value of each of `conditions`: all tiles of a place then answer to the stored targets of the one
            seen so, and are turned as it is; places without it are left out. So nothing is learnt of what the teacher
            makes of other stainings and scanners. None lets each tile answer to its own targets.
    """

    case: str = "case"
    conditions: tuple[str, ...] = ("stain", "scanner")
    reference: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("conditions must name at least one column, such as scanner.")
        if self.reference is not None and len(self.reference) != len(self.conditions):
            raise ValueError(
                f"reference must have one value for each of the conditions {', '.join(self.conditions)}, got "
                f"{', '.join(self.reference) or 'none'}."
            )


class Registered(NamedTuple):
    """Numbers of place and condition, one of each per tile, (n,)."""

    place: npt.NDArray[np.int64]
    """-1 where a tile has no partner under another condition."""
    condition: npt.NDArray[np.int64]
    answers_to: npt.NDArray[np.int64] | None = None
    """Number of the tile whose targets a tile has; None where each has its own."""


def registered_tiles(frame: pd.DataFrame, spec: RegisteredSpec = RegisteredSpec()) -> Registered:
    """Which tiles show one place under several conditions.

    Of a place, tiles that lie further than the tolerance from its median position are no part of it, and of several
    under one condition the first counts.

    Args:
        frame: Manifest or packed index.
        spec: The columns.

    Raises:
        ManifestError: A column is missing, a case has two slides under one condition, no place is seen under two
            conditions, or none under the reference.
    """
    require_columns(frame, (spec.case, *spec.conditions, "x", "y", "mpp", "mpp_level0", "tile_px"))
    check_one_slide(frame, spec.case, spec.conditions)
    place, near = _near_each_other(frame, spec.case)
    names = frame[list(spec.conditions)].astype(str).agg("/".join, axis=1)
    condition = np.unique(np.asarray(names, str), return_inverse=True)[1]
    table = pd.DataFrame({"place": place, "condition": condition})
    first = ~table[near].duplicated(["place", "condition"])
    kept = table[near][first]
    kept = kept[kept.groupby("place")["condition"].transform("size") >= 2]
    if kept.empty:
        raise ManifestError(
            f"The tiles hold no registered pairs: no place of a {spec.case} is seen under two of the "
            f"{len(set(names))} conditions in {' and '.join(spec.conditions)}. Tile slides of the same tissue that are "
            "registered in microns, or make such tiles with `pathokd simulate`."
        )
    answers_to = None
    if spec.reference is not None:
        wanted = "/".join(spec.reference)
        known = kept[names.to_numpy()[kept.index] == wanted].reset_index().set_index("place")["index"]
        if known.empty:
            raise ManifestError(
                f"No registered place is seen under the reference {wanted}: the tiles have "
                f"{', '.join(sorted(set(names)))} in {' and '.join(spec.conditions)}."
            )
        kept = kept[kept["place"].isin(known.index)]
        answers_to = np.arange(len(frame))
        answers_to[kept.index] = known[kept["place"]]
    out = np.full(len(frame), -1, np.int64)
    out[kept.index] = np.unique(kept["place"], return_inverse=True)[1]
    return Registered(out, condition.astype(np.int64), answers_to)


def _near_each_other(frame: pd.DataFrame, case_column: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Numbers of places, (n,): per case and axis, positions with no gap above the tolerance between them are one.

    And which tiles lie within the tolerance of their place's median position, (n,): the others are no part of it.

    Not by rounding to squares: tiles half a tile apart, or of a grid that starts at half a tile, share a square. Of a
    slide cut at several magnifications, tiles of other sides are other places.
    """
    side = tile_um(frame)
    sides, which = np.unique(side, return_inverse=True)
    scale = np.concatenate([[0], np.cumsum(np.diff(sides) > TOLERANCE * sides[:-1])])[which]
    table = pd.DataFrame(centre_um(frame), columns=["x", "y"]).assign(case=case_names(frame, case_column))
    largest = TOLERANCE * side
    for axis in ("x", "y"):
        order = np.lexsort((table[axis], scale, table["case"]))
        case, position = table["case"].to_numpy(str)[order], table[axis].to_numpy()[order]
        new = (case[1:] != case[:-1]) | (np.diff(scale[order]) > 0) | (np.diff(position) > largest[order][1:])
        number = np.empty(len(table), np.int64)
        number[order] = np.concatenate([[0], np.cumsum(new)])
        table[f"{axis} number"] = number
    place = np.asarray(table.groupby(["x number", "y number"]).ngroup(), np.int64)
    off = table[["x", "y"]] - table.groupby(place)[["x", "y"]].transform("median")
    return place, np.linalg.norm(off.to_numpy(), axis=1) <= largest


def require_columns(frame: pd.DataFrame, names: tuple[str, ...]) -> None:
    """Raise ManifestError naming the columns that `frame` lacks."""
    missing = [name for name in names if name not in frame]
    if missing:
        raise ManifestError(
            f"The tiles lack these columns: {', '.join(missing)}; add them to the slide list and tile again "
            f"(there are {', '.join(map(str, frame))})."
        )


def check_one_slide(frame: pd.DataFrame, case_column: str, conditions: tuple[str, ...]) -> None:
    """Raise ManifestError for a case that has two slides under one condition, such as two blocks of a patient.

    By their microns, tiles of one block would be taken for those of the other. Slides that are themselves seen under
    several conditions, as simulated ones, keep their order, and so their tiles find each other.
    """
    if "slide_id" not in frame:
        return
    # A slide in another stain is no second block, also where stains are no condition.
    where = list(dict.fromkeys([*conditions, *(name for name in ("stain", "scanner") if name in frame)]))
    slides = frame[["slide_id", *where]].astype(object).fillna("").astype(str)
    slides = slides.assign(**{case_column: case_names(frame, case_column)}).drop_duplicates()
    slides = slides[slides.groupby("slide_id")["slide_id"].transform("size") == 1]
    crowded = slides[slides.duplicated([case_column, *where], keep=False)]
    if len(crowded):
        (case, *condition), ids = next(iter(crowded.groupby([case_column, *where], sort=False)["slide_id"]))
        first, second, *_ = ids
        raise ManifestError(
            f"{case_column} {case} has several slides under {'/'.join(condition)}, such as {first} and {second}, but "
            f"slides of one {case_column} are taken for the same tissue at the same microns: give each piece of tissue "
            f"a {case_column} of its own (a column patient_id still keeps a patient's together), or leave slides out."
        )


def case_names(frame: pd.DataFrame, column: str) -> npt.NDArray[np.str_]:
    """Whose slides are registered with each other, (n,): of an empty cell nobody knows, and its slide is alone."""
    cases, blank = frame[column].astype(str), blank_cells(frame, column)
    if blank.any():
        cases = cases.mask(blank, "slide " + frame["slide_id"].astype(str))
    return cases.to_numpy(str)


def blank_cells(frame: pd.DataFrame, column: str) -> npt.NDArray[np.bool_]:
    """Where a column says nothing, (n,)."""
    text = frame[column].astype(object).fillna("").astype(str)
    return (text.str.strip() == "").to_numpy(bool)


def first_named(frame: pd.DataFrame, columns: Iterable[str]) -> str | None:
    """The first of some columns that is there and says anything; None if there is none."""
    return next((name for name in columns if name in frame and not blank_cells(frame, name).all()), None)


def patient_names(frame: pd.DataFrame, otherwise: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    """Whose tissue a tile is, (n,), where a column names patients; a patient may have several cases.

    Args:
        frame: Manifest or packed index.
        otherwise: (n,) names where no column does, and for empty cells.
    """
    column = first_named(frame, PATIENT_COLUMNS)
    if column is None:
        return otherwise
    return np.where(blank_cells(frame, column), otherwise, frame[column].astype(str).str.strip().to_numpy(str))


def centre_um(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Tile positions in microns from the slide's corner, (n, 2)."""
    mpp0 = frame["mpp_level0"].to_numpy(np.float64)[:, None]
    half = tile_um(frame)[:, None] / 2
    centre: npt.NDArray[np.float64] = frame[["x", "y"]].to_numpy(np.float64) * mpp0 + half
    return centre


def tile_um(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Sides of tiles in microns, (n,)."""
    side: npt.NDArray[np.float64] = frame["tile_px"].to_numpy(np.float64) * frame["mpp"].to_numpy(np.float64)
    return side


def place_ids(frame: pd.DataFrame, case_column: str = "case") -> npt.NDArray[np.str_]:
    """One name per place: tiles of a case that lie within the tolerance of one position.

    Args:
        frame: Manifest or packed index.
        case_column: The column whose equal values are registered with each other.

    Returns:
        Names, shape (n,).
    """
    place, near = _near_each_other(frame, case_column)
    cases = case_names(frame, case_column)
    names = [
        f"{case}/{number}" if good else f"{case}/{number}/{row}"  # a tile off its place is a place of its own
        for row, (case, number, good) in enumerate(zip(cases, place, near, strict=True))
    ]
    return np.array(names, dtype=np.str_)
