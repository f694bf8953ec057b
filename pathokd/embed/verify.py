"""Is a folder of embeddings complete and sound: every slide there, every array whole, all from one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from pathokd.embed.store import SlideEmbeddings, is_sealed, read_embeddings
from pathokd.embed.tiles import UNREADABLE
from pathokd.errors import ManifestError, StoreError
from pathokd.files import fingerprint
from pathokd.progress import Bars
from pathokd.slides.sources import check_slide_id

ONE_MODEL = ("encoder", "weights_sha256", "readout", "precision", "dtype", "mpp", "tile_px", "icc")
"""Settings that all files of a folder must share."""


SUMMARY_COLUMNS = ("slide_id", "status", "n_unreadable")
"""By these a summary of `pathokd embed` is known."""


class Verdict(NamedTuple):
    """One slide's row."""

    slide_id: str
    status: Literal["ok", "failed", "missing", "damaged", "different"]
    n_tiles: int
    n_flagged: int
    message: str


def verify_embeddings(folder: str | Path) -> pd.DataFrame:
    """Check a folder that `pathokd embed` wrote.

    Every slide of its summary must have a file that is whole, holds one row per tile in every array, finite
    features for good tiles and none for flagged ones, coordinates that match the fingerprint in its header, and the
    model and tile settings of all the others. Files that the summary does not know are checked too.

    Args:
        folder: The folder.

    Returns:
        One row per slide: slide_id, status, n_tiles, n_flagged, message. `failed` is what the run itself could not do,
        `missing` and `damaged` are files to make again, `different` is a file of another model or of other tiles.

    Raises:
        StoreError: No such folder, or it holds neither summary nor embeddings.
    """
    root = Path(folder)
    rows = expected_slides(root)
    verdicts: list[Verdict] = []
    shared: dict[str, Any] = {}
    with Bars() as bars:
        for row in bars.track(rows, "verifying", len(rows)):
            verdicts.append(_verify(root, row, shared))
    return pd.DataFrame(verdicts, columns=list(Verdict._fields))


class Expected(NamedTuple):
    """A slide that a folder should hold."""

    slide_id: str
    status: str
    """What the run said of it: ok, skipped or failed."""
    n_tiles: int | None
    """None if only the file is known."""
    message: str
    path: str
    """The slide's file as the run found it; empty if only the embeddings are known."""


def expected_slides(root: Path) -> list[Expected]:
    """Every slide that the summaries of a folder of embeddings name, then those that only have a file.

    Raises:
        StoreError: No such folder, or it holds neither summary nor embeddings.
    """
    if root.is_file():
        raise StoreError(f"{root} is a file: give the folder that `pathokd embed` wrote.")
    named = [Expected(*row) for row in _summary(root).itertuples(index=False)]
    known = {row.slide_id for row in named}
    extra = sorted(path.stem for path in root.glob("*.h5") if path.stem not in known)
    if not named and not extra:
        raise StoreError(f"{root} holds no embeddings: give the folder that `pathokd embed` wrote.")
    return [*named, *(Expected(name, "ok", None, "", "") for name in extra)]


def _summary(root: Path) -> pd.DataFrame:
    """What the run, or all its shards, expected; what ran last is right where they differ."""
    paths = sorted(root.glob("summary*.csv"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    kinds = dict.fromkeys(("slide_id", "message", "path"), str)
    try:
        parts = [pd.read_csv(p, dtype=kinds, keep_default_na=False) for p in paths]
        if odd := [name for part in parts for name in SUMMARY_COLUMNS if name not in part]:
            raise ValueError(f"it has no column {odd[0]}; give the folder that `pathokd embed` wrote")
        found = [part[list(Expected._fields)].astype({"n_tiles": "int64"}) for part in parts]
        for name in (name for part in found for name in part["slide_id"]):
            check_slide_id(name)
    except (KeyError, ValueError, TypeError, OverflowError, ManifestError) as error:
        raise StoreError(f"{root} holds a summary that is not one of `pathokd embed` ({error}).") from error
    if not found:
        return pd.DataFrame(columns=list(Expected._fields))
    return pd.concat(found, ignore_index=True).drop_duplicates("slide_id", keep="last")


def _verify(root: Path, row: Expected, shared: dict[str, Any]) -> Verdict:
    path = root / f"{row.slide_id}.h5"
    if row.status == "failed" and not path.exists():
        return Verdict(row.slide_id, "failed", 0, 0, row.message)
    if not path.exists():
        return Verdict(row.slide_id, "missing", 0, 0, f"{path} is not there: run `pathokd embed` again.")
    if not is_sealed(path):
        message = f"{path} is truncated, or changed since `pathokd embed` wrote it: delete it and embed again."
        return Verdict(row.slide_id, "damaged", 0, 0, message)
    try:
        found = read_embeddings(path)
    except StoreError as error:
        return Verdict(row.slide_id, "damaged", 0, 0, str(error))
    flagged = len(found.flag) - int(found.good.sum())
    trouble = _unsound(found, None if row.n_tiles is None else int(row.n_tiles))
    if trouble:
        return Verdict(row.slide_id, "damaged", len(found.flag), flagged, trouble)
    settings = found.header.get("settings", {})
    if not shared:
        shared.update(settings)
    message = differs(settings, shared)
    return Verdict(row.slide_id, "different" if message else "ok", len(found.flag), flagged, message)


def differs(settings: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """How a file's settings show another model or other tiles than the first file's; empty if they do not."""
    for name in ONE_MODEL:
        if settings.get(name) != first.get(name):
            return f"{name} is {settings.get(name)!r}, in the first file it is {first.get(name)!r}."
    return ""


def _unsound(found: SlideEmbeddings, n_tiles: int | None) -> str:
    """What is wrong with a file that can be read; empty if nothing is."""
    good = found.good
    if n_tiles is not None and len(found.flag) != n_tiles:
        return f"{len(found.flag)} rows, the summary says {n_tiles}."
    bad = int((~np.isfinite(found.features[good]).all(axis=1)).sum())
    if bad:
        return f"{bad} good tiles have features that are not finite."
    if not np.isnan(found.features[~good]).all():
        return "flagged tiles have features."
    settings = found.header.get("settings", {})
    corners = [found.coords[:, 0].tolist(), found.coords[:, 1].tolist()]
    # Which tiles were called unreadable by the manifest already is not stored: none of them, or all.
    flags = (np.where(found.flag == UNREADABLE, "", found.flag), found.flag)
    if settings.get("tiles") not in [fingerprint([*corners, flag.tolist()]) for flag in flags]:
        return "the coordinates are not those the header was written for."
    if found.features_attrs.get("weights_sha256") != settings.get("weights_sha256"):
        return "header and attributes name different weights."
    return ""
