"""Embed a cohort slide by slide, or a packed folder in one go."""

import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.data.packed import PackedTiles
from pathokd.embed.embedder import Embedder, Precision
from pathokd.embed.engine import EngineName
from pathokd.embed.engines import open_engine
from pathokd.embed.facts import embedding_header, geometry_attrs, mismatches, model_attrs
from pathokd.embed.ledger import Ledger
from pathokd.embed.reading import read_batches
from pathokd.embed.store import StoredDtype, read_good, read_header, write_embeddings
from pathokd.embed.tiles import Reading, embed_tiles
from pathokd.errors import ManifestError, PathokdError, SlideError, StoreError
from pathokd.files import Header, check_header
from pathokd.models import Encoder, Readout, VectorEncoder
from pathokd.progress import Bars
from pathokd.slides.manifest import TileManifest, TileSpec
from pathokd.slides.slide import Slide


class Outcome(NamedTuple):
    """One row of summary.csv."""

    slide_id: str
    path: str
    status: Literal["ok", "failed", "skipped"]
    n_tiles: int
    n_unreadable: int
    seconds: float
    message: str


class PackedEmbeddings(NamedTuple):
    """Vectors of packed tiles and what they are vectors of."""

    features: npt.NDArray[np.float32]
    """(n, d)."""
    tiles: pd.DataFrame
    """The packed index: keys, geometry and metadata of the same n tiles."""


def embed_slides(
    model: Encoder | VectorEncoder | str,
    manifest: TileManifest | str | Path,
    out_dir: str | Path,
    *,
    readout: Readout = "cls",
    batch_size: int = 32,
    workers: int = 2,
    precision: Precision = "auto",
    dtype: StoredDtype = "fp32",
    device: str = "auto",
    overwrite: bool = False,
    shard: tuple[int, int] = (0, 1),
    engine: EngineName = "local",
) -> pd.DataFrame:
    """Embed every tile of a manifest, one HDF5 file per slide.

    A finished slide is skipped if its file was made with the same settings, weights and tiles; a truncated
    file is made again. A slide that cannot be read is one failed row and the run goes on. A tile that
    cannot be read keeps its row with NaN features and the flag `unreadable`; no blank tile stands in for
    it.

    Args:
        model: An encoder, a card's name, `hf-hub:...`, an exported folder, or an encoder that another package offers.
        manifest: The table of tiles, its file, or the folder `pathokd tile` wrote.
        out_dir: Gets `<slide_id>.h5` and `summary.csv`.
        readout: How tokens become one vector.
        batch_size: Tiles per forward pass.
        workers: Threads that read tiles ahead of the model.
        precision: Arithmetic of the forward pass.
        dtype: Stored precision.
        device: `auto` or a torch device.
        overwrite: Redo slides whose file exists, whatever made it.
        shard: (i, n) embeds every n-th slide from the i-th on (from 0), for n processes that share `out_dir`; each
            writes a summary of its own, `summary-i-of-n.csv`.
        engine: `local` is this process. `ray` is the Ray cluster that RAY_ADDRESS names, or one of its own on this
            machine: several slides at a time, each by a process with one GPU, where there are any, and `workers` CPUs;
            `device` is then `auto`, `cpu` or `cuda`. A slide whose process dies is tried again twice.

    Returns:
        The summary, one row per slide, in the manifest's order: slide_id, path, status (ok, failed, skipped), n_tiles,
        n_unreadable, seconds, message.

    Raises:
        StoreError: A file in `out_dir` was made with other settings and `overwrite` is not set; nothing is
            done.
        ManifestError: The manifest holds no tiles.
        PathokdError: Ray is not installed, or its cluster cannot be used.
    """
    table = manifest if isinstance(manifest, TileManifest) else _read_manifest(Path(manifest))
    if table.frame.empty:
        raise ManifestError("The manifest holds no tiles to embed: look at the summary.csv beside it.")
    number, shards = shard
    if not 0 <= number < shards:
        raise ValueError(f"shard should be (i, n) with i from 0 to n - 1, got {shard}.")
    out = Path(out_dir)
    path = out / ("summary.csv" if shards == 1 else f"summary-{number}-of-{shards}.csv")
    with open_engine(engine, device, precision, workers, out) as machine:
        embedder = Embedder(model, readout, machine.precision, machine.device, batch_size)
        slides = itertools.islice(_by_slide(table.frame), number, None, shards)
        jobs = [_job(embedder, tiles, table.spec, dtype, out, overwrite) for tiles in slides]
        work = functools.partial(_one_slide, workers=workers, dtype=dtype)
        ledger = Ledger[Outcome](path, Outcome._fields, [job.slide_id for job in jobs])
        try:
            with Bars() as bars:
                for sentence in mismatches(embedder.encoder.card, table.spec):
                    bars.say(sentence)
                skipped = (work(embedder, job, bars) for job in jobs if job.done)
                done = machine.run(work, embedder, [job for job in jobs if not job.done], _lost, bars)
                for outcome in bars.track(itertools.chain(skipped, done), "Slides", len(jobs)):
                    ledger.add(outcome)
                    if outcome.message:
                        bars.say(f"{outcome.slide_id}: {outcome.message}")
        finally:
            ledger.write()  # an interrupted run also says how far it came
    return ledger.table()


def embed_packed(
    embedder: Embedder,
    packed: PackedTiles | str | Path,
    *,
    workers: int = 2,
    rows: npt.NDArray[np.integer[Any]] | None = None,
    title: str = "Embedding",
) -> PackedEmbeddings:
    """Embed packed tiles into memory, for evaluation.

    Args:
        embedder: Model, readout and batch size.
        packed: The packed tiles or their folder.
        workers: Threads that read and decode ahead of the model.
        rows: Which tiles, as rows of the index; all by default.
        title: Label of the progress bar.

    Returns:
        Float32 vectors and the rows of the index they belong to.

    Raises:
        StoreError: A shard is missing or damaged.
    """
    tiles = packed if isinstance(packed, PackedTiles) else PackedTiles(packed)
    batch_size = embedder.batch_size
    chosen = np.arange(len(tiles)) if rows is None else np.asarray(rows)
    features = np.empty((len(chosen), embedder.dim), np.float32)
    batches = read_batches(
        lambda i: tiles.read(int(chosen[i])), range(len(chosen)), batch_size=batch_size, workers=workers
    )
    with Bars() as bars:
        for batch in bars.track(batches, title, -(-len(chosen) // batch_size)):
            places, images = zip(*batch, strict=True)
            features[list(places)] = embedder(images)
    return PackedEmbeddings(features, tiles.index.iloc[chosen].reset_index(drop=True))


def _read_manifest(path: Path) -> TileManifest:
    return TileManifest.read(path / "manifest.parquet" if path.is_dir() else path)


class _Job(NamedTuple):
    """One slide's work."""

    slide_id: str
    path: Path
    tiles: pd.DataFrame
    spec: TileSpec
    header: Header
    done: bool


def _by_slide(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The tiles of one slide after another, in the manifest's order."""
    for _, tiles in frame.groupby("slide_id", sort=False):
        yield tiles.reset_index(drop=True)


def _job(
    embedder: Embedder, tiles: pd.DataFrame, spec: TileSpec, dtype: StoredDtype, out: Path, overwrite: bool
) -> _Job:
    slide_id = str(tiles["slide_id"].iloc[0])
    header = embedding_header(embedder.facts, slide_id, tiles, spec, dtype)
    path = (out / f"{slide_id}.h5").absolute()  # another process may have another working folder
    return _Job(slide_id, path, tiles, spec, header, not overwrite and _is_done(path, header))


def _lost(job: _Job, message: str) -> Outcome:
    """The failed row of a slide that the engine gave up."""
    return Outcome(job.slide_id, str(job.tiles["path"].iloc[0]), "failed", len(job.tiles), 0, 0.0, message)


def _one_slide(embedder: Embedder, job: _Job, bars: Bars, *, workers: int, dtype: StoredDtype) -> Outcome:
    """Embed one slide, turning what goes wrong in the world into one failed row."""
    slide_path, n, started = str(job.tiles["path"].iloc[0]), len(job.tiles), time.monotonic()
    if job.done:
        flagged = n - int(read_good(job.path).sum())
        return Outcome(job.slide_id, slide_path, "skipped", n, flagged, 0.0, "")
    reading = Reading(embedder.batch_size, workers)
    try:
        with _open(job.tiles, job.spec) as slide:
            features, flag = embed_tiles(embedder, embedder.dim, slide, job.tiles, job.spec, reading, bars)
            coords_attrs = geometry_attrs(slide, job.slide_id, job.tiles, job.spec)
        write_embeddings(
            job.path,
            features,
            job.tiles[["x", "y"]].to_numpy(np.int64),
            flag=flag,
            tissue_fraction=job.tiles["tissue_fraction"].to_numpy(np.float32),
            header=job.header,
            coords_attrs=coords_attrs,
            features_attrs=model_attrs(embedder.facts, job.slide_id, job.header, job.spec),
            dtype=dtype,
        )
    except PathokdError as error:
        return Outcome(job.slide_id, slide_path, "failed", n, 0, time.monotonic() - started, str(error))
    flagged = int((flag != "").sum())
    message = f"{flagged} of {n} tiles are flagged and have no features." if flagged else ""
    return Outcome(job.slide_id, slide_path, "ok", n, flagged, time.monotonic() - started, message)


def _open(tiles: pd.DataFrame, spec: TileSpec) -> Slide:
    """The slide at the mpp its tiles were cut with, which a slide list may have given."""
    path, mpp = str(tiles["path"].iloc[0]), float(tiles["mpp_level0"].iloc[0])
    slide = Slide(path, icc=spec.icc)
    try:
        if abs(slide.mpp - mpp) <= 1e-6 * mpp:
            return slide
    except SlideError:
        pass  # no usable mpp of its own: the manifest's is taken
    slide.close()
    return Slide(path, mpp=mpp, icc=spec.icc)


def _is_done(path: Path, header: Header) -> bool:
    """Whether `path` is whole and made the same way; raises StoreError if it was made another way."""
    try:
        found = read_header(path)
    except StoreError:
        return False  # missing or truncated: made again
    check_header(found, header, path)
    return True
