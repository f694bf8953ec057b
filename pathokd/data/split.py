"""Which tiles are held out, in whole patients, and whether others were learnt from."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pathokd.data.batch import TileSource
from pathokd.data.places import PATIENT_COLUMNS, first_named
from pathokd.data.targets import known_slides
from pathokd.errors import ManifestError
from pathokd.types import IntArray


def split_column(index: pd.DataFrame, split_by: str | None = None) -> str:
    """What train and validation must not share: `split_by`, or patients, cases, slides, the first that is named."""
    return split_by or first_named(index, (*PATIENT_COLUMNS, "case")) or "slide_id"


def split_rows(
    index: pd.DataFrame, *, val_fraction: float, split_by: str | None = None, seed: int = 0
) -> tuple[IntArray, IntArray]:
    """Split tiles so that no group (patient, or else slide) lies on both sides.

    Args:
        index: one row per tile.
        val_fraction: share of the tiles wanted for validation, in [0, 1); whole groups are taken in a seeded order
            until it is reached, those of more than twice the share last; at least one group stays for training.
        split_by: column that names the groups; by default as `split_column`.
        seed: decides which groups.

    Returns:
        Row numbers for training and for validation, each sorted.

    Raises:
        ManifestError: there is no such column, or only one group.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}.")
    column = split_column(index, split_by)
    if column not in index:
        raise ManifestError(f"split_by={column!r} is no column of the tiles; they have {', '.join(index.columns)}.")
    rows = np.arange(len(index))
    if val_fraction == 0:
        return rows, rows[:0]
    sizes = index.groupby(column, sort=True, dropna=False).size()
    if len(sizes) < 2:
        raise ManifestError(
            f"All tiles have {column} = {sizes.index[0]!r}, so nothing can be held out: add slides, or set "
            "data.val_fraction to 0 and train without validation."
        )
    order = sizes.iloc[np.random.default_rng(seed).permutation(len(sizes))]
    wanted = val_fraction * len(index)
    order = order.iloc[np.argsort(order.to_numpy() > 2 * wanted, kind="stable")]
    reached = np.searchsorted(order.cumsum().to_numpy(), wanted) + 1
    held_out = order.index[: min(int(reached), len(order) - 1)]
    in_val = index[column].isin(held_out).to_numpy()
    return rows[~in_val], rows[in_val]


def learnt_slides(source: TileSource, val_rows: IntArray) -> list[str]:
    """Marks of the slides of which no tile is held out, as far as the tiles say what is in their slides.

    Args:
        source: the tiles.
        val_rows: those held out.
    """
    names = source.index["slide_id"].astype(str)
    learnt = set(names) - set(names.iloc[val_rows])
    return sorted(mark for name, mark in known_slides(source).items() if mark is not None and name in learnt)


def check_tiles_held_out(source: TileSource, val_rows: IntArray, split: Mapping[str, Any]) -> None:
    """Refuse to measure on tiles that a training on the same set of tiles learnt from.

    Args:
        source: the tiles.
        val_rows: those to measure on.
        split: `TileDataModule.split` of the training.

    Raises:
        ManifestError: says how many tiles it would be, and what was held out.
    """
    settings = {name: split[name] for name in ("val_fraction", "split_by", "seed")}
    learnt, _ = split_rows(source.index, **settings)
    seen = len(np.intersect1d(learnt, val_rows))
    if seen:
        as_then = "hold out what that run did, by " + ", ".join(f"data.{name} {v}" for name, v in settings.items())
        raise ManifestError(
            f"{seen:,} of these {len(val_rows):,} held-out tiles were for training when this checkpoint was "
            "written, and would be measured as if they were new: "
            f"{as_then if split['val_fraction'] else 'that run held out nothing, so give data.tiles others'}."
        )


def check_slides_held_out(source: TileSource, val_rows: IntArray, learnt: Collection[str]) -> None:
    """Refuse to measure on slides that a training learnt from, though they were tiled or packed otherwise.

    Args:
        source: the tiles.
        val_rows: those to measure on.
        learnt: `learnt_slides` of the training.

    Raises:
        ManifestError: says how many slides it would be, and names one.
    """
    known, marks = known_slides(source), set(learnt)
    slides = source.index["slide_id"].iloc[val_rows].astype(str).unique()
    seen = [name for name in slides if known.get(name) in marks]
    if seen:
        raise ManifestError(
            f"{len(seen):,} of these {len(slides):,} held-out slides, {seen[0]} for one, were for training when this "
            "checkpoint was written, if in other tiles, and would be measured as if they were new: give data.tiles "
            "others."
        )
