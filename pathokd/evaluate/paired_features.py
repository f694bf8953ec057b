"""Features of a paired set, one vector per row: made by a model and kept, or read from a store and aligned.

A store is aligned by names, never by order: slide and coordinates in HDF5 files of `pathokd embed` and in PLISM's
`SLIDE/features.npy`, keys in `.npz` files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pathokd.embed import Embedder, read_embeddings
from pathokd.embed.reading import read_batches
from pathokd.errors import ManifestError, StoreError
from pathokd.evaluate.paired_set import PairedSet, Rows
from pathokd.files import BROKEN_ARRAY, atomic_path, check_header, fingerprint, make_header, write_json
from pathokd.progress import Bars

Features = npt.NDArray[np.float32]
BLOCK = 1024
"""Rows of one file of kept features: a run that was cut off goes on at the block it was at."""
STORES = (
    "a folder of .h5 files from `pathokd embed`, PLISM's folder of SLIDE/features.npy, or .npz with key and features"
)


@dataclass(frozen=True)
class ModelFeatures:
    """Features of every row of a set.

    Args:
        name: Of the model.
        identity: Changes whenever the features do: weights and settings, or the store's files.
        load: Features of some rows, (n, d).
        embedder: The model, where there is one: some measures need to embed changed tiles.
    """

    name: str
    identity: str
    load: Callable[[Rows], Features]
    embedder: Embedder | None = None

    @property
    def params(self) -> int | None:
        """Number of parameters; None where only features are known."""
        return None if self.embedder is None else sum(p.numel() for p in self.embedder.encoder.parameters())


class Facts(NamedTuple):
    """What a report says about a model."""

    name: str
    params: int | None
    dim: int
    source: str


def model_features(
    name: str, embedder: Embedder, tiles: PairedSet, cache: Path, *, workers: int = 2, overwrite: bool = False
) -> ModelFeatures:
    """Embed every tile of a set, keeping blocks of features in `cache`; a run that was cut off goes on.

    Args:
        name: Of the model.
        embedder: The model with its readout.
        tiles: The set.
        cache: Folder of this model's features.
        workers: Threads that read ahead.
        overwrite: Embed again whatever is there.

    Returns:
        Features, read from `cache` as they are needed.

    Raises:
        ManifestError: The set has no pictures.
        StoreError: `cache` was made with other weights, settings or tiles, or features are not finite.
    """
    if tiles.read is None:
        raise ManifestError(
            f"{tiles.source} names no pictures (no column path), so {name} cannot be run on it; add the column, or "
            f"pass stored features: {STORES}."
        )
    settings = {
        "weights_sha256": embedder.weights_sha256,
        "readout": embedder.facts.readout,
        "precision": embedder.precision,
        **embedder.facts.preprocessing,
        "tiles": tiles.fingerprint,
    }
    header = make_header("paired-features/1", settings)
    path = cache / "header.json"
    if path.is_file() and not overwrite:
        check_header(json.loads(path.read_text(encoding="utf-8")), header, path)
    if overwrite:  # away with the old first, or a run that is cut off goes on with blocks of both
        for block in cache.glob("features-*.npy"):
            block.unlink()
    write_json(path, header)
    starts = range(0, len(tiles), BLOCK)
    todo = [start for start in starts if not (cache / _block(start)).is_file()]
    with Bars() as bars:
        for start in bars.track(todo, f"Embedding with {name}", len(todo)):
            _embed_block(embedder, tiles, cache, start, workers, bars, name)
    blocks = [_kept(cache / _block(start), (min(BLOCK, len(tiles) - start), embedder.dim)) for start in starts]

    def load(rows: Rows) -> Features:
        out = np.empty((len(rows), embedder.dim), np.float32)
        for number in np.unique(rows // BLOCK):
            inside = rows // BLOCK == number
            out[inside] = blocks[number][rows[inside] % BLOCK]
        return out

    return ModelFeatures(name, fingerprint(settings), load, embedder)


def _block(start: int) -> str:
    return f"features-{start:08d}.npy"


def _kept(path: Path, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """A block of kept features; StoreError if the file is damaged."""
    try:
        block: npt.NDArray[Any] = np.load(path, mmap_mode="r")
        if block.shape != shape:
            raise ValueError(f"shape {block.shape}, expected {shape}")
    except BROKEN_ARRAY as error:
        raise StoreError(f"{path} is damaged ({error}): delete it and run again, or pass --overwrite.") from error
    return block


def _embed_block(
    embedder: Embedder, tiles: PairedSet, cache: Path, start: int, workers: int, bars: Bars, name: str
) -> None:
    read, size = tiles.read, embedder.batch_size
    rows = range(start, min(start + BLOCK, len(tiles)))
    features = np.empty((len(rows), embedder.dim), np.float32)
    if read is not None:
        batches = read_batches(read, rows, batch_size=size, workers=workers)
        for batch in bars.track(batches, f"tiles {start} to {rows[-1]}", -(-len(rows) // size), keep=False):
            numbers, images = zip(*batch, strict=True)
            features[np.array(numbers) - start] = embedder(images)
    _check(features, name, tiles, np.arange(rows.start, rows.stop))
    with atomic_path(cache / _block(start)) as part, open(part, "wb") as file:
        np.save(file, features)


def holds_features(path: str | Path) -> bool:
    """Whether a path is a store of features rather than a model."""
    path = Path(path)
    return path.suffix == ".npz" or any(next(path.glob(p), None) for p in ("*.npz", "*.h5", "*/features.npy"))


def stored_features(name: str, path: str | Path, tiles: PairedSet) -> ModelFeatures:
    """Open a store of features and find every tile of the set in it.

    Args:
        name: Of the model.
        path: What `STORES` says.
        tiles: The set.

    Returns:
        Features, read slide by slide as they are needed.

    Raises:
        StoreError: No such store, a slide or tile that the store lacks or cannot tell from another, or features that
            are zero or not finite.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path] if path.suffix == ".npz" else []
    if files:
        return _keyed(name, files, tiles)
    slide_file = _slide_files(path)
    if slide_file is None:
        raise StoreError(f"{path} holds no features: expected {STORES}.")
    if not {"slide_id", "x", "y"} <= set(tiles.frame):
        raise StoreError(
            f"{path} names tiles by slide, x and y, but {tiles.source} lacks these columns (slide_id, x, y): add them."
        )
    again = tiles.frame.duplicated(["slide_id", "x", "y"])
    if again.any():  # simulated conditions keep their slide's name, and would all get its own features
        row = tiles.frame[again].iloc[0]
        raise StoreError(
            f"{path} names tiles by slide, x and y, and {tiles.source} shows {row['slide_id']} at x = {row['x']}, "
            f"y = {row['y']} more than once, say under simulated conditions: store features as .npz with key and "
            "features, or pass the model instead."
        )
    slides, coords = tiles.column("slide_id"), tiles.frame[["x", "y"]].to_numpy(np.int64)
    missing = sorted({str(slide) for slide in np.unique(slides) if not slide_file(str(slide)).is_file()})
    if missing:
        raise StoreError(
            f"{name} has no features of {len(missing)} of {len(np.unique(slides))} slides ({missing[0]} is the first): "
            f"embed them, or remove their rows from {tiles.source}."
        )
    used = [slide_file(str(slide)) for slide in np.unique(slides)]

    def load(rows: Rows) -> Features:
        parts: dict[int, npt.NDArray[Any]] = {}
        for slide in np.unique(slides[rows]):
            wanted = np.flatnonzero(slides[rows] == slide)
            stored, where = _read_slide(slide_file(str(slide)))
            positions = _positions(where, coords[rows[wanted]], name, str(slide))
            parts.update(zip(wanted.tolist(), stored[positions], strict=True))
        out = np.stack([parts[i] for i in range(len(rows))]).astype(np.float32)
        _check(out, name, tiles, rows)
        return out

    return ModelFeatures(name, _stamp(used), load)


def _slide_files(path: Path) -> Callable[[str], Path] | None:
    """Where the features of a slide are: PLISM's folders with or without .tif, or HDF5 files."""
    if any(path.glob("*/features.npy")):
        return lambda slide: next(
            (found for stem in (slide, slide + ".tif", slide.removesuffix(".tif"))
             if (found := path / stem / "features.npy").is_file()),
            path / slide / "features.npy",
        )  # fmt: skip
    if any(path.glob("*.h5")):
        return lambda slide: path / f"{slide}.h5"
    return None


def _read_slide(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Features and x, y of all tiles of one slide."""
    if path.suffix == ".h5":
        found = read_embeddings(path)
        return found.features, found.coords
    try:
        table = np.load(path, mmap_mode="r")
    except BROKEN_ARRAY as error:
        raise StoreError(f"{path} is truncated or no array: extract the slide again.") from error
    if table.ndim != 2 or table.shape[1] < 4:
        raise StoreError(f"{path} should have shape (n, 3 + d): level, x, y and features, got {table.shape}.")
    return table[:, 3:], np.asarray(table[:, 1:3]).round().astype(np.int64)


def _positions(
    where: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], name: str, slide: str
) -> npt.NDArray[np.int64]:
    """Where in a slide's table the wanted coordinates stand."""
    at = {(int(x), int(y)): number for number, (x, y) in enumerate(where)}
    positions = [at.get((int(x), int(y)), -1) for x, y in wanted]
    lost = positions.count(-1)
    if lost:
        x, y = wanted[positions.index(-1)]
        raise StoreError(
            f"{name} lacks {lost} of {len(wanted)} tiles of {slide} (the first at x = {x}, y = {y}): features and "
            "pairs should be of the same tiles."
        )
    return np.array(positions, dtype=np.int64)


def _keyed(name: str, files: list[Path], tiles: PairedSet) -> ModelFeatures:
    """Arrays `key` and `features`, or one array per key as PathoROB stores them."""
    found: dict[str, npt.NDArray[Any]] = {}
    for path in files:
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                if {"key", "features"} <= set(file):
                    rows = list(zip(file["key"].astype(str).tolist(), file["features"], strict=True))
                else:
                    rows = [(key, file[key]) for key in file]
            for key, vector in rows:
                if key in found:
                    raise StoreError(f"{name} has features of {key} twice (again in {path}): keep one of the two.")
                found[key] = vector.astype(np.float32)
                if found[key].ndim != 1 or len(found[key]) != len(next(iter(found.values()))):
                    raise StoreError(
                        f"{path} should hold one vector per tile, all of one length, got shape {vector.shape} for "
                        f"{key}."
                    )
        except BROKEN_ARRAY as error:
            raise StoreError(f"{path} should hold the arrays key, (n,), and features, (n, d): {error}.") from error
    keys = tiles.column("key").tolist()
    missing = [key for key in keys if key not in found]
    if missing:
        raise StoreError(
            f"{name} lacks {len(missing)} of {len(keys)} tiles ({missing[0]} is the first): store features under the "
            f"keys of {tiles.source}, in any order."
        )
    table = np.stack([found[key] for key in keys])
    _check(table, name, tiles, np.arange(len(keys)))
    return ModelFeatures(name, _stamp(files), lambda rows: table[rows])


def _stamp(files: list[Path]) -> str:
    """Identifies files by name, size and time of change: hashing gigabytes would take longer than the measures."""
    return fingerprint([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files])


def _check(features: Features, name: str, tiles: PairedSet, rows: Rows) -> None:
    """Raise StoreError for rows without direction."""
    bad = ~np.isfinite(features).all(axis=1)
    kind = "NaN or infinite"
    if not bad.any():
        bad, kind = ~features.any(axis=1), "zero"
    if bad.any():
        first = tiles.column("key", rows[np.flatnonzero(bad)[:1]])[0]
        raise StoreError(
            f"{name} has {kind} features for {bad.sum()} of {len(features)} tiles (the first is {first}): leave those "
            "tiles out, or find out why the model gives nothing for them."
        )
