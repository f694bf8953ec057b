"""Pack a tile manifest into shards: threads read and encode, one writer keeps the order."""

import io
import itertools
import shutil
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from pathokd.data.batch import TileSource
from pathokd.data.packed import INDEX_NAME, SCHEMA, read_index
from pathokd.data.targets import check_slides, slide_marks
from pathokd.data.wsi import WsiTiles, read_manifest
from pathokd.errors import ManifestError, SlideError, StoreError
from pathokd.files import Header, atomic_path, check_header, fingerprint, make_header, remove_leftovers
from pathokd.processes import usable_cores
from pathokd.progress import Bars
from pathokd.slides.manifest import join_manifests, write_table
from pathokd.types import Rgb

UNREADABLE = "unreadable"
_PARTS = ".parts"
_TAR_BLOCK = 512
_TASK_TILES = 16


@dataclass(frozen=True)
class PackSpec:
    """How tiles are stored.

    Args:
        quality: JPEG quality, 1 to 100; chroma is never subsampled. 0 stores PNG, without loss.
        shard_tiles: tiles per shard.
    """

    quality: int = 90
    shard_tiles: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, or be 0 for PNG, got {self.quality}.")
        if self.shard_tiles < 1:
            raise ValueError(f"shard_tiles must be at least 1, got {self.shard_tiles}.")

    @property
    def extension(self) -> str:
        """File ending of a stored tile."""
        return "jpg" if self.quality else "png"


class PackResult(NamedTuple):
    """What `pack_tiles` did.

    tiles: stored tiles. unreadable: one row per tile that could not be read, with the column `message`.
    """

    tiles: int
    unreadable: pd.DataFrame


def encode(tile: Rgb, spec: PackSpec) -> bytes:
    """Encode one RGB tile as `spec` says."""
    bgr = cv2.cvtColor(tile, cv2.COLOR_RGB2BGR)
    if spec.quality:
        options = [cv2.IMWRITE_JPEG_QUALITY, spec.quality]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        _, encoded = cv2.imencode(".jpg", bgr, options)
    else:
        _, encoded = cv2.imencode(".png", bgr)
    return encoded.tobytes()


def pack_tiles(
    manifests: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    spec: PackSpec | None = None,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> PackResult:
    """Read every good tile of one or more manifests and store it under `out_dir`.

    Whole shards that are there already are kept, so an interrupted run goes on where it stopped. A tile that cannot be
    read is left out, counted, and listed in `unreadable.csv`.

    Args:
        manifests: `manifest.parquet`, or the folder that holds it; several become one set of tiles, say of several
            magnifications or of cohorts tiled apart.
        out_dir: the packed folder.
        spec: how to store.
        workers: reading threads; by default one per core.
        overwrite: pack anew although `out_dir` was made with other settings, or is complete.

    Raises:
        ManifestError: no tiles to pack, or manifests that do not go together (`join_manifests`).
        StoreError: `out_dir` was made with other settings or of other slides of these names, or the disk is full.
    """
    spec = spec or PackSpec()
    paths = [manifests] if isinstance(manifests, str | Path) else manifests
    tiles = WsiTiles(join_manifests([read_manifest(path) for path in paths]))
    settings = {**asdict(spec), "tiles": asdict(tiles.spec), "manifest": source_identity(tiles.index)}
    return pack_source(tiles, out_dir, spec, settings, slides=slide_marks(tiles), workers=workers, overwrite=overwrite)


def pack_source(
    source: TileSource,
    out_dir: str | Path,
    spec: PackSpec,
    settings: Mapping[str, Any],
    *,
    slides: Mapping[str, str | None] | None = None,
    verb: str = "pack",
    workers: int | None = None,
    overwrite: bool = False,
) -> PackResult:
    """Store every tile of a source under `out_dir`; `pack_tiles` says how.

    Args:
        source: the tiles; its `read` is called from many threads.
        out_dir: the packed folder.
        spec: how to store.
        settings: what made the tiles, for the header that decides on reuse.
        slides: `slide_marks` of what the tiles are read from; a slide copied anew asks for `overwrite` too.
        verb: of `pathokd`, for messages.
        workers: reading threads; by default one per core.
        overwrite: pack anew.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    out, header = Path(out_dir), make_header(SCHEMA, settings)
    if slides:
        header["slides"] = dict(slides)
    if overwrite:
        _clear(out)
    elif (out / INDEX_NAME).exists():
        index, found = read_index(out / INDEX_NAME)
        check_header(found, header, out / INDEX_NAME)
        check_slides(found, slides or {}, f"The tiles in {out}", verb)
        return PackResult(len(index), _read_unreadable(out))
    _pack_shards(source, out, spec, header, workers or usable_cores(), verb)
    return _finish(out, header)


def source_identity(frame: pd.DataFrame) -> str:
    """A fingerprint of which tiles there are."""
    return fingerprint(frame[["slide_id", "path", "x", "y", "mpp", "tile_px"]].to_csv(index=False))


def _clear(out: Path) -> None:
    (out / INDEX_NAME).unlink(missing_ok=True)  # first: without an index nothing reads the shards
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    for shard in out.glob("shard-*.tar"):
        shard.unlink()


def _pack_shards(source: TileSource, out: Path, spec: PackSpec, header: Header, workers: int, verb: str) -> None:
    remove_leftovers(out, "shard-*.tar")
    starts = range(0, len(source), spec.shard_tiles)
    todo = [start for start in starts if not _shard_done(out, start // spec.shard_tiles, header, verb)]
    rows = sum(min(spec.shard_tiles, len(source) - start) for start in todo)
    with Bars() as bars, ThreadPoolExecutor(workers) as pool:
        wanted = (row for start in todo for row in range(start, min(start + spec.shard_tiles, len(source))))
        stream = bars.track(_read_ahead(pool, source, spec, wanted, 2 * workers), "packing tiles", rows)
        for start in todo:
            count = min(spec.shard_tiles, len(source) - start)
            _write_shard(out, start // spec.shard_tiles, source.index, stream, count, spec, header)
        next(stream, None)  # lets the bar see its last tile


class _Encoded(NamedTuple):
    row: int
    image: bytes
    message: str


def _read_ahead(
    pool: ThreadPoolExecutor, source: TileSource, spec: PackSpec, rows: Iterator[int], depth: int
) -> Iterator[_Encoded]:
    """Encoded tiles in order, at most `depth` tasks ahead of the writer.

    A task is several tiles: handing over single ones would cost the interpreter as much as writing them.
    """

    def work(row: int) -> _Encoded:
        try:
            return _Encoded(row, encode(source.read(row), spec), "")
        except SlideError as error:
            return _Encoded(row, b"", str(error))

    waiting: deque[Future[list[_Encoded]]] = deque()
    try:
        while task := tuple(itertools.islice(rows, _TASK_TILES)):
            waiting.append(pool.submit(lambda some: [work(row) for row in some], task))
            if len(waiting) >= depth:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _write_shard(
    out: Path, number: int, frame: pd.DataFrame, stream: Iterator[_Encoded], count: int, spec: PackSpec, header: Header
) -> None:
    name = f"shard-{number:06d}.tar"
    offsets, sizes, rows, failures = [], [], [], []
    start = number * spec.shard_tiles
    keys = frame["key"].to_list()
    records = frame.iloc[start : start + count].to_json(orient="records", lines=True).split("\n")
    with atomic_path(out / name) as part, tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        for _ in range(count):
            tile = next(stream)
            if tile.message:
                failures.append((tile.row, tile.message))
                continue
            offsets.append(_add(tar, f"{keys[tile.row]}.{spec.extension}", tile.image))
            _add(tar, f"{keys[tile.row]}.json", records[tile.row - start].encode())
            sizes.append(len(tile.image))
            rows.append(tile.row)
    part_index = frame.iloc[rows].assign(shard=name, offset=np.array(offsets, np.int64), size=np.array(sizes, np.int64))
    write_table(_failures(frame, failures), header, _part(out, number, "unreadable"))
    write_table(part_index, header, _part(out, number, "index"))  # last: its presence says the shard is whole


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member; returns the offset of its bytes (a long name takes extra blocks before them)."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    padded = -(-len(content) // _TAR_BLOCK) * _TAR_BLOCK
    return int(tar.offset) - padded


def _failures(frame: pd.DataFrame, failures: list[tuple[int, str]]) -> pd.DataFrame:
    lost = frame.iloc[[row for row, _ in failures]][["key", "slide_id", "x", "y"]]
    messages = pd.Series([message for _, message in failures], index=lost.index, dtype=object)
    return lost.assign(flag=UNREADABLE, message=messages, shard="", offset=np.int64(0), size=np.int64(0))


def _part(out: Path, number: int, kind: str) -> Path:
    return out / _PARTS / f"{kind}-{number:06d}.parquet"


def _shard_done(out: Path, number: int, header: Header, verb: str) -> bool:
    path = _part(out, number, "index")
    if not path.exists() or not (out / f"shard-{number:06d}.tar").exists():
        return False
    try:
        _, found = read_index(path)
    except ManifestError:
        return False
    check_header(found, header, path)
    check_slides(found, header.get("slides", {}), f"The tiles in {out}", verb)
    return True


def _finish(out: Path, header: Header) -> PackResult:
    parts = [read_index(path)[0] for path in sorted((out / _PARTS).glob("index-*.parquet"))]
    lost = [read_index(path)[0] for path in sorted((out / _PARTS).glob("unreadable-*.parquet"))]
    unreadable = pd.concat(lost, ignore_index=True).drop(columns=["shard", "offset", "size"])
    index = pd.concat(parts, ignore_index=True)
    if index.empty:
        raise ManifestError(f"Not one tile could be read; the first says: {unreadable['message'].iloc[0]}")
    with atomic_path(out / "unreadable.csv") as part:
        unreadable.to_csv(part, index=False)
    write_table(index, header, out / INDEX_NAME)
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    return PackResult(len(index), unreadable)


def _read_unreadable(out: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(out / "unreadable.csv", dtype={"slide_id": str}, keep_default_na=False)
    except FileNotFoundError:
        raise StoreError(f"{out}/unreadable.csv is missing beside the index: pack again with --overwrite.") from None
