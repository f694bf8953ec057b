"""Embed a cohort slide by slide, or a packed folder in one go."""

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathokd.data.packed import PackedTiles
from pathokd.embed.embedder import Embedder, Precision
from pathokd.embed.engine import EngineName
from pathokd.embed.engines import open_engine
from pathokd.embed.facts import geometry_attrs, mismatches, model_attrs
from pathokd.embed.jobs import Job, plan
from pathokd.embed.ledger import Ledger
from pathokd.embed.reading import read_batches
from pathokd.embed.speed import Spent, speed
from pathokd.embed.store import StoredDtype, read_good, write_embeddings
from pathokd.embed.tiles import Reading, embed_tiles
from pathokd.embed.verify import SUMMARY_COLUMNS
from pathokd.errors import PathokdError, SlideError, StoreError
from pathokd.files import check_summary, remove_leftovers
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
    wait_s: float = 0.0
    """This and the rest: see `Spent`."""
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    read_s: float = 0.0
    read_cpu_s: float = 0.0


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
    compile: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] = (0, 1),
    engine: EngineName = "local",
) -> pd.DataFrame:
    """Embed every tile of a manifest, one HDF5 file per slide.

    A finished slide is skipped if its file was made with the same settings, weights and tiles; a truncated
    file is made again. A slide that cannot be read is one failed row and the run goes on. A tile that
    cannot be read keeps its row with NaN features and the flag `unreadable`; no blank tile stands in for
    it. The last lines on stderr say how fast reading, preprocessing and encoding were, and what held the run up.

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
        compile: Compile the model; see `Embedder`.
        overwrite: Redo slides whose file exists, whatever made it; of a slide that then fails, no file is left.
        shard: (i, n) embeds every n-th slide from the i-th on (from 0), for n processes that share `out_dir`; each
            writes a summary of its own, `summary-i-of-n.csv`.
        engine: `local` is this process. `ray` is the Ray cluster that RAY_ADDRESS names, or one of its own on this
            machine: several slides at a time, each by a process with one GPU, where there are any, and `workers` CPUs;
            `device` is then `auto`, `cpu` or `cuda`. A slide whose process dies is tried again twice.

    Returns:
        The summary, one row per slide, in the manifest's order: slide_id, path, status (ok, failed, skipped), n_tiles,
        n_unreadable, seconds, message, and the seconds of each part (`Spent`).

    Raises:
        StoreError: A file in `out_dir` was made with other settings or by another program, and `overwrite` is not
            set; nothing is done. Or `out_dir` cannot be written to; the slides embedded so far stay.
        ManifestError: The manifest holds no tiles, or a slide_id that cannot name a file.
        PathokdError: Ray is not installed, or its cluster cannot be used.
    """
    table = manifest if isinstance(manifest, TileManifest) else _read_manifest(Path(manifest))
    number, shards = shard
    if workers < 1:
        raise ValueError(f"workers should be at least 1, got {workers}.")
    out = Path(out_dir)
    path = out / summary_name(number, shards)
    with open_engine(engine, device, precision, workers, out) as machine:
        embedder = Embedder(model, readout, machine.precision, machine.device, batch_size, compile=compile)
        jobs = plan(embedder, table, out, dtype=dtype, overwrite=overwrite, shard=shard)
        check_summary(path, SUMMARY_COLUMNS, "embed")
        remove_leftovers(out, "*.h5")
        work = functools.partial(_one_slide, workers=workers, dtype=dtype)
        ledger = Ledger[Outcome](path, Outcome._fields, [job.slide_id for job in jobs])
        try:
            with Bars() as bars:
                for sentence in mismatches(embedder.encoder.card, table.spec):
                    bars.say(sentence)
                for sentence in _others(out, table):
                    bars.say(sentence)
                skipped = (work(embedder, job, bars) for job in jobs if job.done)
                done = machine.run(work, embedder, [job for job in jobs if not job.done], _lost, bars)
                for outcome in bars.track(itertools.chain(skipped, done), "Slides", len(jobs)):
                    ledger.add(outcome)
                    if outcome.message:
                        bars.say(f"{outcome.slide_id}: {outcome.message}")
                if engine == "local":  # elsewhere slides run beside each other, and their seconds do not add up
                    for sentence in speed(
                        ledger.table(), workers=workers, batch_size=batch_size, device=embedder.device.type
                    ):
                        bars.say(sentence)
        except BaseException:
            # An interrupted run also says how far it came; if even that fails, the first trouble is the one to tell.
            with contextlib.suppress(StoreError):
                ledger.write()
            raise
        ledger.write()
    return ledger.table()


def _others(out: Path, table: TileManifest) -> Iterator[str]:
    """Says that OUT holds features of slides that are not among the tiles, which `export` and MIL code take too."""
    others = {path.stem for path in out.glob("*.h5")} - {*table.frame["slide_id"].astype(str)}
    if others:
        yield (
            f"{out} also holds features of {len(others)} slides without tiles here ({min(others)} is one), and "
            "whoever reads the folder takes them too: delete them unless they belong together."
        )


def summary_name(number: int, shards: int) -> str:
    """File name of the summary of one shard of so many."""
    return "summary.csv" if shards == 1 else f"summary-{number}-of-{shards}.csv"


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


def _lost(job: Job, message: str) -> Outcome:
    """The failed row of a slide that the engine gave up."""
    _remove_earlier(job)
    return Outcome(job.slide_id, str(job.tiles["path"].iloc[0]), "failed", len(job.tiles), 0, 0.0, message)


def _remove_earlier(job: Job) -> None:
    """Take away the file that a failed slide should have replaced: among the others it would pass for one of them."""
    with contextlib.suppress(OSError):
        job.path.unlink()


def _one_slide(embedder: Embedder, job: Job, bars: Bars, *, workers: int, dtype: StoredDtype) -> Outcome:
    """Embed one slide, turning what goes wrong in the world into one failed row."""
    slide_path, n, started = str(job.tiles["path"].iloc[0]), len(job.tiles), time.monotonic()
    if job.done:
        flagged = n - int(read_good(job.path).sum())
        lost = flagged - int((job.tiles["flag"] != "").sum())
        again = f"{lost} of {n} tiles could not be read; if the slide was mended since, --overwrite tries them again."
        return Outcome(job.slide_id, slide_path, "skipped", n, flagged, 0.0, again if lost else "")
    reading, spent = Reading(embedder.batch_size, workers), Spent()
    try:
        if job.replaced:  # its tissue may lie elsewhere, and its pixels have another size
            raise SlideError(f"{slide_path} is not the slide that was tiled under this name: tile it again.")
        with _open(job.tiles, job.spec) as slide:
            features, flag = embed_tiles(
                embedder.stream, embedder.dim, slide, job.tiles, job.spec, reading, bars, spent
            )
            coords_attrs = geometry_attrs(slide, job.slide_id, job.tiles, job.spec)
            features_attrs = model_attrs(embedder.facts, job.slide_id, job.header, slide)
        write_embeddings(
            job.path,
            features,
            job.tiles[["x", "y"]].to_numpy(np.int64),
            flag=flag,
            tissue_fraction=job.tiles["tissue_fraction"].to_numpy(np.float32),
            header=job.header,
            coords_attrs=coords_attrs,
            features_attrs=features_attrs,
            dtype=dtype,
        )
    except PathokdError as error:
        if isinstance(error, StoreError) and isinstance(error.__cause__, OSError):
            raise  # the output folder is full or read-only: every further slide would be embedded for nothing
        _remove_earlier(job)
        return Outcome(job.slide_id, slide_path, "failed", n, 0, time.monotonic() - started, str(error))
    flagged = int((flag != "").sum())
    message = f"{flagged} of {n} tiles are flagged and have no features." if flagged else ""
    parts = (round(seconds, 4) for seconds in astuple(spent))
    return Outcome(job.slide_id, slide_path, "ok", n, flagged, time.monotonic() - started, message, *parts)


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
