"""The table of tiles and the settings that made it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pathokd.errors import ManifestError
from pathokd.files import Header, atomic_path, make_header
from pathokd.slides.grid import Border
from pathokd.slides.resolution import MPP_RANGE
from pathokd.types import Microns, Mpp

SCHEMA = "manifest/1"
HEADER_KEY = b"pathokd"
"""Key of the JSON header in the Parquet schema metadata."""

MARKS = "slides"
"""Key of the facts of a manifest: what was in each slide (`file_mark`), by slide_id, when it was tiled."""

BROKEN_TABLE = (pa.ArrowException, OSError, ValueError, KeyError)
"""What pyarrow and pandas raise, depending on the byte, for a Parquet file that is cut off or damaged."""

COLUMNS: dict[str, str] = {
    "slide_id": "str",
    "path": "str",
    "x": "int64",
    "y": "int64",
    "mpp": "float64",
    "mpp_level0": "float64",
    "tile_px": "int32",
    "tissue_fraction": "float32",
    "flag": "str",
}
"""Columns every manifest has, in order, with their types; metadata columns follow them."""

LABEL_COLUMNS = ("label", "label_share")
"""Columns a slide with a label map adds: the class that covers most of the tile, and its share of the
tile."""


@dataclass(frozen=True)
class TileSpec:
    """How slides are cut into tiles.

    Args:
        mpp: microns per tile pixel.
        tile_px: side of a tile in pixels.
        stride_px: step between tiles in tile pixels; None is `tile_px`.
        min_tissue: least share of a tile covered by tissue, 0 to 1; 0 keeps every tile.
        icc: convert colours from the slide's ICC profile to sRGB when tiles are read.
        allow_upsampling: accept slides coarser than `mpp`.
        border: "inside" keeps tiles wholly on the slide, "cover" adds those that overhang (white outside).
        mask_mpp: microns per pixel of the overview that the tissue mask is made on.
    """

    mpp: Mpp = 0.5
    tile_px: int = 224
    stride_px: int | None = None
    min_tissue: float = 0.25
    icc: bool = False
    allow_upsampling: bool = False
    border: Border = "inside"
    mask_mpp: Mpp = 8.0

    def __post_init__(self) -> None:
        for name in ("mpp", "tile_px", "mask_mpp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.mpp < MPP_RANGE[0]:
            raise ValueError(
                f"mpp is in microns per tile pixel and at least {MPP_RANGE[0]:g}, got {self.mpp!r}: say 0.5."
            )
        if self.stride_px is not None and self.stride_px < 1:
            raise ValueError(f"stride_px must be at least 1 or None (no overlap), got {self.stride_px!r}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"min_tissue is a share between 0 and 1, got {self.min_tissue!r}")
        if self.border not in ("inside", "cover"):
            raise ValueError(f"border must be 'inside' or 'cover', got {self.border!r}")

    @property
    def tile_um(self) -> Microns:
        """Side of a tile in microns."""
        return self.mpp * self.tile_px


@dataclass(frozen=True)
class TileManifest:
    """Tiles of one or many slides.

    Args:
        frame: one row per tile, `COLUMNS` first, then metadata columns (strings, and the float
            `label_share`). `flag` is "" for a good tile, else a word such as "unreadable".
        spec: the settings that made it.
        extra: further settings that belong in the header, say which slide it is.
        facts: what is recorded in the header without deciding on reuse, say warnings.
    """

    frame: pd.DataFrame
    spec: TileSpec
    extra: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def header(self) -> Header:
        """Schema, version and settings, as stored in the file."""
        return {**make_header(SCHEMA, {**asdict(self.spec), **self.extra}), "facts": self.facts}

    def write(self, path: str | Path) -> None:
        """Write as Parquet, atomically.

        Raises:
            ManifestError: a column is missing.
            StoreError: the file cannot be written.
        """
        missing = [name for name in COLUMNS if name not in self.frame]
        if missing:
            raise ManifestError(f"A manifest for {path} lacks the columns {', '.join(missing)}.")
        write_table(typed(self.frame), self.header, path)

    @classmethod
    def read(cls, path: str | Path) -> "TileManifest":
        """Read a manifest back with its settings.

        Raises:
            ManifestError: the file is missing, truncated, or no pathokd manifest.
        """
        header, table = read_table(path)
        settings = dict(header["settings"])
        known = {name: settings.pop(name) for name in asdict(TileSpec()) if name in settings}
        try:
            frame = typed(table.to_pandas())
        except BROKEN_TABLE as error:
            raise ManifestError(f"{path} is damaged ({error}): make it again.") from error
        return cls(frame, TileSpec(**known), settings, header.get("facts", {}))


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with manifest columns first and of their declared types, metadata as strings."""
    metadata = [name for name in frame.columns if name not in COLUMNS]
    out = frame[[*COLUMNS, *metadata]].astype(COLUMNS)
    for name in metadata:
        out[name] = out[name].astype("float32") if name == "label_share" else out[name].fillna("").astype("str")
    return out.reset_index(drop=True)


def join_manifests(manifests: Sequence[TileManifest]) -> TileManifest:
    """Several manifests as one, such as slides cut at several magnifications, or cohorts that were tiled apart.

    Args:
        manifests: At least one; each row keeps its `mpp`, and all else of the settings is the first one's, but that
            upsampling is allowed if any allows it.

    Raises:
        ManifestError: tiles of several sizes or colours, one tile twice, or two slides of one name.
    """
    first, *others = manifests
    if not others:
        return first
    for name in ("tile_px", "icc"):
        values = {getattr(each.spec, name) for each in manifests}
        if len(values) > 1:
            raise ManifestError(
                f"The tables of tiles have several values of {name}, {' and '.join(map(str, sorted(values)))}: tiles "
                "that are packed together share it."
            )
    frame = typed(pd.concat([each.frame for each in manifests], ignore_index=True))
    twice = frame.duplicated(["slide_id", "x", "y", "mpp"])
    if twice.any():
        slide, x, y, mpp = frame.loc[twice, ["slide_id", "x", "y", "mpp"]].iloc[0]
        raise ManifestError(
            f"The tile of slide {slide} at ({x}, {y}), {mpp:g} um/px, stands in two tables: give each tile once."
        )
    check_slides_agree(frame)
    upsampling = any(each.spec.allow_upsampling for each in manifests)  # each table was refused where it may not
    return TileManifest(frame, replace(first.spec, allow_upsampling=upsampling))


def check_slides_agree(frame: pd.DataFrame) -> None:
    """Refuse tiles of which two slides bear one name.

    Raises:
        ManifestError: names the first such slide.
    """
    slides = frame[["slide_id", "path", "mpp_level0"]].drop_duplicates()
    slides = slides.assign(path=slides["path"].map(os.path.realpath))  # one file may be spelt in several ways
    for name in ("path", "mpp_level0"):
        values = slides.groupby("slide_id", sort=False)[name].unique()
        several = values[values.map(len) > 1]
        if len(several):
            first, second = several.iloc[0][:2]
            raise ManifestError(
                f"Tiles of the slide {several.index[0]!r} have two values of {name}, {first} and {second}: give each "
                "slide its own slide_id."
            )


def empty_frame() -> pd.DataFrame:
    """A manifest without tiles."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})


def write_table(frame: pd.DataFrame, header: Header, path: str | Path) -> None:
    """Write `frame` as Parquet with `header` in the schema metadata, atomically."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = {**(table.schema.metadata or {}), HEADER_KEY: json.dumps(header).encode()}
    with atomic_path(path) as part:
        pq.write_table(table.replace_schema_metadata(metadata), part)


def read_header(path: str | Path) -> Header:
    """The JSON header of a manifest.

    Raises:
        ManifestError: the file is missing, truncated, or has no pathokd header.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError as error:
        raise ManifestError(f"{path} does not exist: make it with `pathokd tile`.") from error
    except BROKEN_TABLE as error:
        raise ManifestError(f"{path} is no readable Parquet file ({error}): make it again.") from error
    if HEADER_KEY not in metadata:
        raise ManifestError(f"{path} has no pathokd header: expected a manifest written by `pathokd tile`.")
    try:
        header: Header = json.loads(metadata[HEADER_KEY])
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}): make it again.") from error
    return header


def read_table(path: str | Path) -> tuple[Header, pa.Table]:
    """Header and table of a manifest.

    Raises:
        ManifestError: as `read_header`, or the schema is of another version.
    """
    header = read_header(path)
    if header.get("schema") != SCHEMA:
        raise ManifestError(f"{path} has schema {header.get('schema')!r}, expected {SCHEMA!r}: make it again.")
    try:
        table = pq.read_table(path)
    except BROKEN_TABLE as error:
        raise ManifestError(f"{path} is damaged ({error}): make it again.") from error
    return header, table
