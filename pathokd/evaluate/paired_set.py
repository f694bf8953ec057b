"""Tiles to measure robustness on: registered ones by `pair_id`, and unregistered ones by label and centre.

A paired manifest has one row per tile: `pair_id` names the place, `stain` and `scanner` the condition, and `site`,
`label`, `case` whatever else is known. Rows are put together by `pair_id`, never by their order. Without `pair_id`, the
columns `label` and `site` (PathoROB's `biological_class` and `medical_center`) allow the measures that need no pairs.
Of an empty cell in `case` nobody knows: its place, or its slide or tile, is a case of its own. A column that names
patients (`patient_id`) keeps a patient's cases together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.data.places import PATIENT_COLUMNS, blank_cells, first_named, patient_names
from pathokd.errors import ManifestError
from pathokd.evaluate.bootstrap import FEW_GROUPS
from pathokd.files import fingerprint
from pathokd.metrics.aggregate import Condition
from pathokd.types import Rgb

Rows = npt.NDArray[np.int64]
Read = Callable[[int], Rgb]
"""From a row to its tile; safe to call from several threads."""
ALIASES = {
    "biological_class": "label",
    "medical_center": "site",
    "center": "site",
    "centre": "site",
    "hospital": "site",
    "staining": "stain",
    "image_path": "path",
    "sample_id": "key",
}
"""Other names of columns, taken where the proper one is missing; of several the first."""
MIN_SHARE = 0.6
"""Tiles count as labelled if one class covers this share of them (where `label_share` says)."""
NO_TISSUE = ("", "background", "nan")


@dataclass(frozen=True)
class PairedSet:
    """Tiles under one or several conditions.

    Args:
        frame: One row per tile, from `prepare`.
        source: Where it came from, for people.
        read: Gives the tile of a row; None where there are no pictures, only features.
        notes: What was left out, in sentences.
    """

    frame: pd.DataFrame
    source: str
    read: Read | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def registered(self) -> bool:
        """Whether there are pairs."""
        return "pair_id" in self.frame

    @cached_property
    def fingerprint(self) -> str:
        """Identifies tiles and conditions; features made for one set are reused only for the same.

        `size` is that of a packed tile and `file_mark` of what is in a file: a key alone does not tell that tiles were
        packed or exported anew, slides scanned anew, or a place of a slide moved.
        """
        named = ("key", "pair_id", "condition", "x", "y", "mpp", "mpp_level0", "tile_px", "size", "file_mark")
        wanted = [name for name in named if name in self.frame]
        return fingerprint([self.frame[name].tolist() for name in wanted])

    @cached_property
    def conditions(self) -> dict[str, Condition]:
        """Staining and scanner by the condition's name, in order of appearance; empty if unregistered."""
        if not self.registered:
            return {}
        first = self.frame.drop_duplicates("condition")
        return {
            str(name): Condition(stain, scanner)
            for name, stain, scanner in zip(first["condition"], first["stain"], first["scanner"], strict=True)
        }

    @cached_property
    def places(self) -> npt.NDArray[np.str_]:
        """Names of the places seen under every condition, in order of appearance."""
        if not self.registered:
            return np.array([], dtype=np.str_)
        seen = self.frame.groupby("pair_id", sort=False)["condition"].nunique()
        return np.asarray(seen.index[seen == len(self.conditions)], dtype=np.str_)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """Rows of `places` under each condition: row i of all of them is one place."""
        table = pd.Series(np.arange(len(self.frame)), index=[self.frame["condition"], self.frame["pair_id"]])
        return {name: table[name].reindex(self.places).to_numpy(np.int64) for name in self.conditions}

    def column(self, name: str, rows: Rows | None = None) -> npt.NDArray[np.str_]:
        """A column as strings, of all rows or some."""
        values = self.frame[name] if rows is None else self.frame[name].iloc[rows]
        return np.asarray(values.astype(str).to_numpy(), dtype=np.str_)

    def known(self, name: str, rows: Rows | None = None) -> Rows:
        """Those of all rows or some of which a column says anything; none without the column."""
        rows = np.arange(len(self), dtype=np.int64) if rows is None else rows
        return rows[np.char.strip(self.column(name, rows)) != ""] if name in self.frame else rows[:0]

    def varies(self, name: str) -> bool:
        """Whether a column names two values or more."""
        return len(np.unique(self.column(name, self.known(name)))) >= 2 if name in self.frame else False

    def labelled(self) -> Rows:
        """Rows with a class of tissue; none if there is no column `label`."""
        if "label" not in self.frame:
            return np.array([], dtype=np.int64)
        good = ~self.frame["label"].astype(str).isin(NO_TISSUE).to_numpy()
        if "label_share" in self.frame:
            good &= self.frame["label_share"].to_numpy(np.float64) >= MIN_SHARE
        return np.flatnonzero(good).astype(np.int64)

    def unit_column(self) -> str:
        """What intervals resample as a whole: patients, cases or slides if there are enough, else places or tiles."""
        for name in ("patient", "case", *(() if self.registered else ("slide_id",))):
            if name in self.frame and self.frame[name].nunique() >= FEW_GROUPS:
                return str(name)
        return "pair_id" if self.registered else "key"

    def apart_column(self) -> str:
        """What must not lie on both sides of a comparison: the patient or case, else the place, the slide or tile."""
        for name in ("patient", "case"):
            if name in self.frame and self.frame[name].nunique() >= 2:
                return name
        return "pair_id" if self.registered else "slide_id" if "slide_id" in self.frame else "key"


def prepare(
    frame: pd.DataFrame,
    source: str,
    read: Read | None = None,
    *,
    drop_unpaired: bool = False,
) -> PairedSet:
    """Check a table of tiles and make it a set.

    Args:
        frame: One row per tile.
        source: Where it came from, for messages.
        read: Gives the tile of a row of `frame`.
        drop_unpaired: Leave out rows whose place occurs once, instead of refusing them.

    Returns:
        The set, registered if there is a column `pair_id`.

    Raises:
        ManifestError: No rows, missing columns, empty or repeated pair_ids, unpaired rows, fewer than two conditions,
            or no place that all conditions share.
    """
    frame = proper_names(frame).reset_index(drop=True)
    if frame.empty:
        raise ManifestError(f"{source} holds no tiles: there should be one row per tile.")
    paired = "pair_id" in frame and ("scanner" in frame or "stain" in frame)
    if not paired and not ("site" in frame or "scanner" in frame):
        raise ManifestError(
            f"{source} should have the columns pair_id, stain and scanner (registered tiles), or label and site "
            "(unregistered ones; PathoROB's biological_class and medical_center do as well), got "
            f"{', '.join(map(str, frame))}."
        )
    if not paired:
        frame = frame.drop(columns=["pair_id"], errors="ignore")
    for name in ("stain", "scanner", "pair_id", "site", "label", "case", "slide_id"):
        if name in frame:
            frame[name] = frame[name].astype(object).fillna("").astype(str)
    frame = frame.assign(key=_keys(frame))
    if "case" in frame:
        frame = _own_cases(frame, "pair_id" if paired else "slide_id" if "slide_id" in frame else "key")
    if first_named(frame, PATIENT_COLUMNS):
        unit = "case" if "case" in frame else "slide_id" if "slide_id" in frame else "pair_id" if paired else "key"
        frame = frame.assign(patient=patient_names(frame, frame[unit].to_numpy(str)))
    if not paired:
        return _unpaired(frame, source, read)
    return _paired(frame, source, read, drop_unpaired)


def proper_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with columns renamed as `ALIASES` says."""
    found = {new: old for old, new in reversed(ALIASES.items()) if old in frame and new not in frame}
    return frame.rename(columns={old: new for new, old in found.items()})


def _keys(frame: pd.DataFrame) -> pd.Series:
    """One unique name per tile."""
    if "key" in frame and frame["key"].is_unique:
        return frame["key"].astype(str)
    for names in (("slide_id", "patch_id"), ("pair_id", "stain", "scanner"), ("slide_id", "x", "y"), ("path",)):
        if all(name in frame for name in names):
            keys = frame[list(names)].astype(str).agg("-".join, axis=1)
            if keys.is_unique:
                return keys
    return pd.Series([f"tile-{row}" for row in range(len(frame))])


def _own_cases(frame: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The table with a case for each `unit` whose cell is empty, but the one its other rows name, if any does.

    Together they would be one case: kept apart from each other, and one draw of the bootstrap.
    """
    named = frame["case"].where(frame["case"].str.strip() != "")
    if named.isna().all():
        return frame.drop(columns="case")
    whose = frame[unit].where(frame[unit].str.strip() != "", frame["key"])
    known = named.fillna(named.groupby(whose).transform("first"))
    return frame.assign(case=known.fillna(f"{unit} " + whose))


def _unpaired(frame: pd.DataFrame, source: str, read: Read | None) -> PairedSet:
    """Tiles of unknown site are of no site that others could share."""
    name = "site" if "site" in frame else "scanner"
    known = np.flatnonzero((frame[name].str.strip() != "").to_numpy())
    if len(known) == len(frame):
        return PairedSet(frame, source, read)
    if not len(known):
        raise ManifestError(f"{source}: the column {name} is empty; name the {name} of each tile.")
    note = f"{len(frame) - len(known)} of {len(frame)} tiles name no {name} and are left out."
    frame, read = _only(frame, read, known)
    return PairedSet(frame, source, read, (note,))


def _paired(frame: pd.DataFrame, source: str, read: Read | None, drop_unpaired: bool) -> PairedSet:
    for name in ("stain", "scanner"):
        if name not in frame:
            frame[name] = "same"
        check_named(frame, name, source)
    frame["condition"] = frame["stain"] + "_" + frame["scanner"]
    if (frame["pair_id"] == "").any():
        raise ManifestError(f"{source}: {(frame['pair_id'] == '').sum()} rows have no pair_id; name the place of each.")
    twice = frame.duplicated(["pair_id", "condition"])
    if twice.any():
        row = frame[twice].iloc[0]
        raise ManifestError(
            f"{source}: place {row['pair_id']} occurs more than once under {row['condition']} ({twice.sum()} such "
            "rows); a place should have one tile per staining and scanner."
        )
    names = frame["condition"].unique()
    if len(names) < 2:
        raise ManifestError(
            f"{source} shows every tile under one staining and one scanner only ({names[0]}), so there is nothing to "
            "compare; add tiles of another scanner, or make some with `pathokd simulate`."
        )
    alone = frame.groupby("pair_id")["condition"].transform("nunique") == 1
    notes = []
    if alone.any():
        if not drop_unpaired:
            raise ManifestError(
                f"{source}: {alone.sum()} of {len(frame)} rows are unpaired (place {frame['pair_id'][alone].iloc[0]} "
                "occurs under one condition only); correct their pair_id, or pass --drop-unpaired to leave them out."
            )
        if alone.all():
            raise ManifestError(
                f"{source}: no place is seen under two of its conditions ({', '.join(map(str, names[:4]))}), so there "
                "is nothing to compare; give registered slides of one tissue the same `case`, or "
                "make pairs with `pathokd simulate`."
            )
        kept = np.flatnonzero(~alone.to_numpy())
        notes.append(f"{alone.sum()} of {len(frame)} tiles show places seen once and are left out.")
        frame, read = _only(frame, read, kept)
    found = PairedSet(frame, source, read, tuple(notes))
    if len(found.places) < 2:
        sizes = frame["condition"].value_counts()
        raise ManifestError(
            f"{source}: only {len(found.places)} places are seen under all {len(names)} conditions; {sizes.index[-1]} "
            f"has the fewest tiles ({sizes.iloc[-1]}): remove its rows, or add the missing ones."
        )
    total = frame["pair_id"].nunique()
    if len(found.places) < total:
        partial = f"{len(found.places)} of {total} places are seen under all {len(names)} conditions; pairs use these."
        found = PairedSet(frame, source, read, (*notes, partial))
    return found


def check_named(frame: pd.DataFrame, name: str, source: str) -> None:
    """Raise ManifestError where some rows have a condition and others none: who knows which of the others it is."""
    blank = blank_cells(frame, name)
    if blank.any() and not blank.all():
        raise ManifestError(
            f"{source}: {blank.sum()} of {len(frame)} rows have no {name}, which may be one of those that the others "
            f"have ({frame[name][~blank].iloc[0]} is one): fill it in, or leave these rows out."
        )


def _only(frame: pd.DataFrame, read: Read | None, kept: npt.NDArray[np.intp]) -> tuple[pd.DataFrame, Read | None]:
    """Some rows of a table, and what reads the tile of each."""
    return frame.iloc[kept].reset_index(drop=True), None if read is None else lambda row: read(int(kept[row]))
