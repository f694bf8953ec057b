"""Where paired tiles come from: manifests, packed folders, PLISM's files, a folder per scanner."""

import functools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pathokd.data.packed import INDEX_NAME, PackedTiles, decode
from pathokd.data.places import check_one_slide, place_ids
from pathokd.data.wsi import MANIFEST_NAME, WsiTiles, read_manifest
from pathokd.errors import ManifestError, SlideError, StoreError
from pathokd.evaluate.paired_set import PairedSet, Read, prepare, proper_names
from pathokd.files import BROKEN_ARRAY, file_mark
from pathokd.metrics.aggregate import plism_condition
from pathokd.pictures import read_image
from pathokd.slides.manifest import BROKEN_TABLE, HEADER_KEY, TileManifest, TileSpec, typed
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
PLISM_H5 = "*.tif.h5"
PLISM_FEATURES = "*/features.npy"


def open_pairs(path: str | Path, *, drop_unpaired: bool = False) -> PairedSet:
    """Open any paired or labelled set of tiles.

    Args:
        path: A paired manifest (CSV or Parquet); a packed folder or a folder of `pathokd tile` with the columns stain,
            scanner and case; PLISM's folder of HDF5 files, its tile Parquet file or folder, or its SLIDE/features.npy
            alone; or a folder with one folder per scanner, in which equal file names are the same place.
        drop_unpaired: Leave rows of a manifest whose place occurs once out instead of refusing them.

    Returns:
        The set.

    Raises:
        ManifestError: There is nothing of these kinds, or what there is cannot be paired.
    """
    path = Path(path)
    if not path.exists():
        raise ManifestError(f"{path} does not exist: --pairs takes a manifest, a packed folder or a folder of tiles.")
    if path.is_file() and path.name in (INDEX_NAME, MANIFEST_NAME) and HEADER_KEY in (_schema(path).metadata or {}):
        path = path.parent  # the folder knows how its tiles are read
    if path.is_file():
        return _table(path, drop_unpaired)
    if (path / INDEX_NAME).is_file():
        tiles = PackedTiles(path)
        return _tiles(tiles.index, tiles.read, str(path), drop_unpaired)
    if (path / MANIFEST_NAME).is_file():
        slides = WsiTiles(read_manifest(path))
        colours = " icc" if slides.spec.icc else ""
        return _tiles(_marked(slides.index, Path(), colours), slides.read, str(path), drop_unpaired)
    if any(path.glob(PLISM_H5)):
        return _plism_h5(path, drop_unpaired)
    if any(path.glob(PLISM_FEATURES)):
        return _plism_features(path, drop_unpaired)
    if any(path.glob("*.parquet")):
        return _plism_parquet(sorted(path.glob("*.parquet")), str(path), drop_unpaired)
    return _folders(path)


def _tiles(index: pd.DataFrame, read: Read, source: str, drop_unpaired: bool = False) -> PairedSet:
    """Tiles of registered slides: one case, one place in microns, whatever the pixel size."""
    if "case" not in index or not ({"stain", "scanner"} & set(index)):
        return prepare(index, source, read, drop_unpaired=drop_unpaired)
    names = [name for name in ("stain", "scanner") if name in index]
    check_one_slide(index, "case", tuple(names))
    frame = index.assign(pair_id=place_ids(index))
    # Of tiles of one condition at one place the first stays.
    first = np.flatnonzero(~frame.duplicated(["pair_id", *names]).to_numpy())
    rows = first.tolist()
    found = prepare(frame.iloc[first], source, lambda row: read(rows[row]), drop_unpaired=True)
    if len(first) < len(frame):
        note = (
            f"{len(frame) - len(first)} of {len(frame)} tiles show a place that another tile of their condition shows, "
            "and are left out."
        )
        found = PairedSet(found.frame, source, found.read, (note, *found.notes))
    return found


def _marked(frame: pd.DataFrame, folder: Path, colours: str = "") -> pd.DataFrame:
    """The table with what tells each row's file from another of its name (see `file_mark`); a missing one has none.

    Not by its size: pictures that are not compressed have one size, whatever they show.
    """
    marks = {path: f"{file_mark(folder / path)}{colours}" for path in frame["path"].unique()}
    return frame.assign(file_mark=frame["path"].map(marks))


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except BROKEN_TABLE as error:
        raise ManifestError(f"{path} is no readable Parquet file ({error}): make it again.") from error


def _parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=columns)
    except BROKEN_TABLE as error:
        raise ManifestError(f"{path} is no readable Parquet file ({error}): make it again.") from error


def _table(path: Path, drop_unpaired: bool) -> PairedSet:
    if path.suffix == ".csv":
        try:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        except ValueError as error:  # pandas' own errors and those of decoding are such
            raise ManifestError(f"{path} is no table in UTF-8 ({error}): save it as a CSV in UTF-8.") from error
    elif path.suffix == ".parquet":
        if {"tile_id", "png"} <= set(_schema(path).names):
            return _plism_parquet([path], str(path), drop_unpaired)
        frame = _parquet(path)
    else:
        raise ManifestError(f"{path} should be a .csv or .parquet manifest, or a folder, got {path.suffix!r}.")
    frame = proper_names(frame)
    for name in ("x", "y"):
        if name in frame:
            frame[name] = _numbers(frame, name, str(path), whole=True).astype(np.int64)
    if "label_share" in frame:  # an unlabelled tile has none
        shares = frame.assign(label_share=frame["label_share"].astype(object).replace("", 0.0).fillna(0.0))
        frame["label_share"] = _numbers(shares, "label_share", str(path), whole=False)
    for name in ("mpp", "tile_px", "mpp_level0"):
        if name in frame and "path" in frame:
            frame[name] = _numbers(frame, name, str(path), whole=name == "tile_px", above=0.0)
    for name in ("mpp", "tile_px"):
        if name in frame and frame[name].nunique() > 1:
            values = ", ".join(f"{value:g}" for value in sorted(frame[name].unique())[:4])
            raise ManifestError(
                f"{path} should have one {name} for all tiles, as models take one size, got {values}: name the pixel "
                "size that the tiles shall be read at."
            )
    if "path" in frame:
        bad = ~frame["path"].map(lambda text: isinstance(text, str) and text != "").to_numpy(bool)
        if bad.any():
            raise ManifestError(
                f"{path} should name a file in the column path of each row, got {frame['path'][bad].iloc[0]!r} in row "
                f"{int(np.flatnonzero(bad)[0]) + 1}: fill it in, or remove the row."
            )
        frame = _marked(frame, path.parent)
    return prepare(frame, str(path), _manifest_reader(frame, path.parent), drop_unpaired=drop_unpaired)


def _numbers(frame: pd.DataFrame, name: str, source: str, *, whole: bool, above: float = -np.inf) -> pd.Series:
    """A column as numbers; ManifestError names the first row that holds none."""
    found = pd.to_numeric(frame[name], errors="coerce").astype(np.float64)
    bad = ~(np.isfinite(found) & (found > above)) | (whole & (found % 1 != 0))
    if bad.any():
        kind = f"{'whole ' * whole}numbers{' above 0' * (above == 0)}"
        raise ManifestError(
            f"{source} should hold {kind} in the column {name}, got {frame[name][bad].iloc[0]!r} in row "
            f"{int(np.flatnonzero(bad)[0]) + 1}: correct it."
        )
    return found


def _manifest_reader(frame: pd.DataFrame, folder: Path) -> Read | None:
    """Pictures by `path`, or places of slides by `path`, x and y; None if there is no path."""
    if "path" not in frame:
        return None
    paths = [str(folder / text) for text in frame["path"]]  # an absolute path stays what it is
    if not {"x", "y"} <= set(frame):
        return lambda row: _picture(Path(paths[row]))
    return _slide_reader(frame.assign(path=paths))


def _slide_reader(frame: pd.DataFrame) -> Read:
    """Tiles of slides; `mpp` and `tile_px` default to 0.5 and 224, `mpp_level0` to what the slide says."""
    spec = TileSpec(
        mpp=float(frame["mpp"].iloc[0]) if "mpp" in frame else 0.5,
        tile_px=int(frame["tile_px"].iloc[0]) if "tile_px" in frame else 224,
    )
    if "mpp_level0" in frame:
        mpp0 = frame["mpp_level0"].astype(float)
    else:
        mpp0 = frame["path"].map({path: _mpp(path) for path in frame["path"].unique()})
    table = frame[["path", "x", "y"]].assign(
        slide_id=frame["slide_id"] if "slide_id" in frame else frame["path"],
        mpp=spec.mpp,
        mpp_level0=mpp0,
        tile_px=spec.tile_px,
        tissue_fraction=1.0,
        flag="",
    )
    tiles = WsiTiles(TileManifest(typed(table), spec))
    size = functools.lru_cache(maxsize=None)(_size)

    def read(row: int) -> Rgb:
        at = table.iloc[row]
        side = spec.tile_px * spec.mpp / at["mpp_level0"]
        if any(not -side < at[axis] < length for axis, length in zip("xy", size(at["path"]), strict=True)):
            raise ManifestError(
                f"{at['path']} has no tile at x = {at['x']}, y = {at['y']}, which is off the slide: x and y should be "
                "level-0 pixels of the file in path; leave them out where each path is one tile."
            )
        return tiles.read(row)

    return read


def _size(path: str) -> tuple[int, int]:
    with Slide(path) as slide:
        return slide.dimensions


def _mpp(path: str) -> float:
    try:
        with Slide(path) as slide:
            return float(slide.mpp)
    except SlideError as error:
        raise ManifestError(f"{error} (give a column mpp_level0 where a slide does not say its own).") from error


def _picture(path: Path) -> Rgb:
    try:
        return read_image(path)
    except StoreError as error:
        raise StoreError(f"{path} cannot be read as a picture ({error}): correct its path in the manifest.") from error


def _plism_h5(folder: Path, drop_unpaired: bool) -> PairedSet:
    """One file per slide, `STAIN_SCANNER_to_GMH_S60.tif.h5`, one dataset per tile, `NAME_LEVEL_X_Y`."""
    files = {path.name.removesuffix(".h5"): path for path in sorted(folder.glob(PLISM_H5))}
    frames = []
    for slide, path in files.items():
        try:
            with h5py.File(path, "r") as file:
                names = list(file)
        except BROKEN_ARRAY as error:
            raise ManifestError(f"{path} is truncated or no HDF5 file: download it again.") from error
        frames.append(_plism_rows(slide, names))
    frame = pd.concat(frames, ignore_index=True)
    read = _H5Reader(files, frame["slide_id"].tolist(), frame["tile_id"].tolist())
    return prepare(frame, str(folder), read, drop_unpaired=drop_unpaired)


def _plism_features(folder: Path, drop_unpaired: bool) -> PairedSet:
    """Features without tiles, one (n, 3 + d) array of level, x, y and features per slide."""
    frames = []
    for path in sorted(folder.glob(PLISM_FEATURES)):
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except BROKEN_ARRAY as error:
            raise ManifestError(f"{path} is truncated or no array: extract the slide again.") from error
        if table.ndim != 2 or table.shape[1] < 4:
            raise ManifestError(f"{path} should have shape (n, 3 + d): level, x, y and features, got {table.shape}.")
        where = table[:, :3].round().astype(np.int64).tolist()
        frames.append(_plism_rows(path.parent.name, [f"tile_{level}_{x}_{y}" for level, x, y in where]))
    return prepare(pd.concat(frames, ignore_index=True), str(folder), drop_unpaired=drop_unpaired)


def _plism_rows(slide: str, names: list[str]) -> pd.DataFrame:
    """Tiles of one slide, sorted by (x, y) as the published index files count them."""
    fields = [name.split("_")[-3:] for name in names]
    if not names or any(len(parts) < 3 or not all(part.isdigit() for part in parts) for parts in fields):
        raise ManifestError(f"{slide} should hold tiles named NAME_LEVEL_X_Y, as PLISM's do, got {names[:1]}.")
    condition = plism_condition(slide)
    rows = pd.DataFrame({"tile_id": names, "x": [int(f[1]) for f in fields], "y": [int(f[2]) for f in fields]})
    rows = rows.assign(slide_id=slide, stain=condition.stain, scanner=condition.scanner)
    rows["pair_id"] = rows["x"].astype(str) + "_" + rows["y"].astype(str)
    return rows.sort_values(["x", "y"], ignore_index=True)


class _H5Reader:
    """Tiles by file and dataset name; HDF5 is read by one thread at a time."""

    def __init__(self, files: dict[str, Path], slides: list[str], names: list[str]) -> None:
        self.files, self.slides, self.names = files, slides, names
        self.lock = threading.Lock()
        self.slide = ""
        self.file: h5py.File | None = None

    def __call__(self, row: int) -> Rgb:
        with self.lock:
            if self.slides[row] != self.slide:
                if self.file is not None:
                    self.file.close()
                self.slide = self.slides[row]
                self.file = h5py.File(self.files[self.slide], "r")
            dataset: Any = self.file
            try:
                tile = np.asarray(dataset[self.names[row]][...])
            except BROKEN_ARRAY as error:
                where = f"{self.names[row]} of {self.files[self.slide]}"
                raise StoreError(f"{where} cannot be read ({error}): download the file again.") from error
        if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape[2] != 3:
            raise StoreError(
                f"{self.names[row]} of {self.files[self.slides[row]]} should be a tile of 8-bit RGB, got {tile.dtype} "
                f"{tile.shape}: write it as uint8 (height, width, 3)."
            )
        return tile


def _plism_parquet(files: list[Path], source: str, drop_unpaired: bool = False) -> PairedSet:
    """PLISM's tile table: slide_id, tile_id, png (bytes, or a struct with bytes)."""
    frames, origin = [], []
    for number, path in enumerate(files):
        lacking = [name for name in ("slide_id", "tile_id", "png") if name not in _schema(path).names]
        if lacking:
            raise ManifestError(
                f"{path} should hold PLISM's tiles and lacks the columns {', '.join(lacking)}: pass a paired manifest "
                "by its own path, not that of its folder."
            )
        table = _parquet(path, ["slide_id", "tile_id"])
        origin += [(number, row) for row in range(len(table))]
        frames.append(table)
    frame = pd.concat(frames, ignore_index=True)
    twice = frame.duplicated()
    if twice.any():
        slide, tile = frame[twice].iloc[0]
        raise ManifestError(
            f"{source} holds tile {tile} of {slide} twice ({twice.sum()} such rows): remove one of them."
        )
    rows = []
    for slide, tiles in frame.groupby("slide_id", sort=True):
        ordered = _plism_rows(str(slide), tiles["tile_id"].tolist())
        places = pd.Series(tiles.index, index=tiles["tile_id"])
        rows.append(ordered.assign(origin=places[ordered["tile_id"]].to_numpy()))
    table = pd.concat(rows, ignore_index=True)
    place = [origin[row] for row in table["origin"]]
    read = _parquet_reader(files, place)
    return prepare(table.drop(columns="origin"), source, read, drop_unpaired=drop_unpaired)


def _parquet_reader(files: list[Path], place: list[tuple[int, int]]) -> Read:
    """Row groups are kept one at a time, as rows are asked for in their order."""
    opened = [pq.ParquetFile(path) for path in files]
    starts = [np.cumsum([0, *(f.metadata.row_group(g).num_rows for g in range(f.num_row_groups))]) for f in opened]
    lock, held = threading.Lock(), {"at": (-1, -1), "png": []}

    def read(row: int) -> Rgb:
        number, inside = place[row]
        group = int(np.searchsorted(starts[number], inside, side="right")) - 1
        with lock:
            if held["at"] != (number, group):
                try:
                    column = opened[number].read_row_group(group, columns=["png"])["png"].to_pylist()
                except BROKEN_TABLE as error:
                    raise StoreError(f"{files[number]} is damaged ({error}): download it again.") from error
                held.update(at=(number, group), png=column)
            png: Any = held["png"][inside - int(starts[number][group])]
        return decode(png["bytes"] if isinstance(png, dict) else png, f"Row {inside} of {files[number]}")

    return read


def _folders(folder: Path) -> PairedSet:
    """One folder per scanner, or per staining and scanner (`HE_AT2`); equal names are one place."""
    rows = [
        {"pair_id": picture.stem, "path": str(picture), **_named(scanner.name)}
        for scanner in sorted(folder.iterdir())
        if scanner.is_dir()
        for picture in sorted(scanner.iterdir())
        if picture.suffix.lower() in PICTURES
    ]
    if not rows:
        raise ManifestError(
            f"{folder} holds nothing to pair: expected index.parquet (`pathokd pack`), manifest.parquet (`pathokd "
            "tile`), PLISM's .tif.h5, .parquet or features.npy files, or one folder of pictures per scanner."
        )
    frame = _marked(pd.DataFrame(rows), Path())
    _check_names(frame[["stain", "scanner"]].drop_duplicates())
    reader: Callable[[int], Rgb] = lambda row: _picture(Path(frame["path"].iloc[row]))  # noqa: E731
    return prepare(frame, str(folder), reader, drop_unpaired=True)


def _check_names(read: pd.DataFrame) -> None:
    """Warn where `Hamamatsu_S60` and `Leica_GT450` may be makers and models rather than stainings and scanners."""
    if read["stain"].nunique() > 1 and not read["scanner"].duplicated().any():
        stain, scanner = next((row.stain, row.scanner) for row in read.itertuples() if row.stain != "same")
        warnings.warn(
            f"The folder {stain}_{scanner} is read as staining {stain} on scanner {scanner}, yet no scanner has two "
            f"stainings: if the folders name scanners only, call it {stain}-{scanner}, and the others likewise.",
            stacklevel=2,
        )


def _named(folder: str) -> dict[str, str]:
    stain, _, scanner = folder.rpartition("_")
    return {"stain": stain or "same", "scanner": scanner}
