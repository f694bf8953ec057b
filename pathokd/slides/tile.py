"""`tile_slides`: many slides to manifests, one outcome per slide, in threads, resumable."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from pathokd.errors import ManifestError, SlideError, StoreError
from pathokd.files import atomic_path, check_folder, check_header, check_summary, file_mark, sha256_file, write_json
from pathokd.progress import Bars
from pathokd.slides.contours import mask_geojson
from pathokd.slides.grid import tile_grid
from pathokd.slides.labels import label_map_files, read_label_map, tile_labels
from pathokd.slides.manifest import MARKS, TileManifest, TileSpec, empty_frame, read_header, typed
from pathokd.slides.overlay import draw_overlay, jpeg_bytes
from pathokd.slides.overview import Overview
from pathokd.slides.slide import Slide
from pathokd.slides.sources import SlideSource
from pathokd.slides.tissue import NOT_BRIGHTFIELD, is_brightfield, tissue_fraction, tissue_mask
from pathokd.types import Mask

MASK_MAX_PX = 2048
"""Longest side of the overview that the mask is made on."""
OVERLAY_MAX_PX = 1600
"""Longest side of the overlay picture."""


@dataclass(frozen=True)
class Outcome:
    """One slide's row in summary.csv."""

    slide_id: str
    path: str
    status: Literal["ok", "failed", "skipped"]
    """"ok" = tiled now, "skipped" = an earlier run's result was reused, "failed" = see `message`."""
    n_tiles: int
    mpp_level0: float
    mpp_source: str
    seconds: float
    message: str
    """The failure's sentence, or warnings."""


def tile_slides(
    sources: list[SlideSource],
    spec: TileSpec,
    out_dir: str | Path,
    *,
    workers: int = 2,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Cut slides into tiles: find tissue, lay a grid, and write a manifest of the tiles that hold enough of
    it.

    Pixels are not read here, only overviews. Writes OUT/tiles/ID.parquet, OUT/geojson/ID.geojson and
    OUT/overlays/ID.jpg per slide, and OUT/manifest.parquet and OUT/summary.csv over all of `sources`. A slide that
    fails is one row with its sentence; the others go on. Slides done by an earlier run with the same settings are
    skipped, failed and half-written ones redone.

    Args:
        sources: from `find_slides`.
        spec: how to cut.
        out_dir: made if missing.
        workers: slides at once, in threads.
        overwrite: redo slides that are already done.

    Returns:
        the summary: one row per slide in the order of `sources`, columns as in `Outcome`.

    Raises:
        ManifestError: no sources.
        StoreError: OUT holds tiles made with other settings (the message names the field), or cannot be
            written.
    """
    if not sources:
        raise ManifestError("No slides to tile: expected at least one.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = Path(out_dir)
    check_folder(out)
    check_summary(out / "summary.csv", ("slide_id", "status", "mpp_source"), "tile")
    done = set() if overwrite else {s.slide_id for s in sources if _is_done(s, spec, out)}
    outcomes: dict[str, Outcome] = {}
    with Bars() as bars, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_tile_or_reuse, s, spec, out, s.slide_id in done): s for s in sources}
        try:
            for outcome in bars.track(_results(futures), "tile slides", len(sources)):
                outcomes[outcome.slide_id] = outcome
                if outcome.status == "failed":
                    bars.say(f"{outcome.slide_id}: {outcome.message}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for sentence in _left_out(sources, out):
            bars.say(sentence)
    summary = pd.DataFrame([asdict(outcomes[s.slide_id]) for s in sources])
    tiled = [TileManifest.read(_tiles_path(out, o.slide_id)) for o in outcomes.values() if o.status != "failed"]
    marks = {name: mark for each in tiled for name, mark in each.facts.get(MARKS, {}).items()}
    merged = _merge([each.frame for each in tiled], sources)
    TileManifest(merged, spec, facts={MARKS: marks}).write(out / "manifest.parquet")
    with atomic_path(out / "summary.csv") as part:
        summary.to_csv(part, index=False)
    return summary


def tile_slide(source: SlideSource, spec: TileSpec, out_dir: str | Path) -> Outcome:
    """Tile one slide and write its files.

    Raises:
        SlideError: the slide cannot be used.
        ManifestError: its label map cannot be used.
    """
    started = time.monotonic()
    out = Path(out_dir)
    marks = {source.slide_id: file_mark(source.path)}
    with source.open(icc=spec.icc) as slide:
        kept, n_grid, overview, mask = cut_slide(slide, source, spec)
        write_json(
            out / "geojson" / f"{source.slide_id}.geojson",
            mask_geojson(mask, overview.downsample, slide.dimensions),
        )
        picture = draw_overlay(
            slide.overview(max_px=OVERLAY_MAX_PX),
            mask,
            overview.downsample,
            kept["x"].to_numpy(),
            kept["y"].to_numpy(),
            spec.tile_um / slide.mpp,
        )
        with atomic_path(out / "overlays" / f"{source.slide_id}.jpg") as part:
            part.write_bytes(jpeg_bytes(picture))
        message = " ".join([*slide.warnings, *_remarks(n_grid, len(kept), overview, mask)])
        facts: dict[str, Any] = {"mpp_level0": slide.mpp, "mpp_source": slide.mpp_source, "message": message}
        given = slide.mpp if slide.mpp_source == "given" else None
        # Written last: this file is what says that the slide is done.
        manifest = TileManifest(kept, spec, source_facts(source, given), {**facts, MARKS: marks})
        manifest.write(_tiles_path(out, source.slide_id))
        return _outcome(source, "ok", len(kept), started, **facts)


class Cut(NamedTuple):
    """A slide cut into tiles."""

    kept: pd.DataFrame
    """Tiles with enough tissue, columns as in a manifest."""
    n_grid: int
    """Tiles of the whole grid."""
    overview: Overview
    mask: Mask


def cut_slide(slide: Slide, source: SlideSource, spec: TileSpec) -> Cut:
    """Find tissue and lay the grid over it; writes nothing.

    Raises:
        SlideError: no usable mpp, too coarse, or not brightfield.
        ManifestError: its label map cannot be used.
    """
    slide.check_mpp(spec.mpp, spec.allow_upsampling)
    overview = slide.overview(mpp=spec.mask_mpp, max_px=MASK_MAX_PX)
    if not is_brightfield(overview.rgb):
        raise SlideError(NOT_BRIGHTFIELD.format(path=source.path))
    mask = find_tissue(overview, slide.mpp)
    frame = _tiles(source, spec, slide, overview, mask)
    kept = frame[frame["tissue_fraction"] >= spec.min_tissue].reset_index(drop=True)
    return Cut(kept, len(frame), overview, mask)


def find_tissue(overview: Overview, mpp_level0: float) -> Mask:
    """Tissue on an overview. Unreadable places count as tissue, so that their tiles are tried, not dropped
    unseen."""
    mask: Mask = tissue_mask(overview.rgb, mpp_level0 * overview.downsample) | overview.unreadable
    return mask


def source_facts(source: SlideSource, mpp_given: float | None) -> dict[str, Any]:
    """What a slide's tiles depend on besides the settings, for the header of its manifest.

    Args:
        source: the slide.
        mpp_given: microns per level-0 pixel if the user gave it and it was taken, None if the file's was.
    """
    try:
        stat = source.path.stat()
    except (OSError, ValueError):  # opening it will say what is wrong with it
        stat = None
    facts: dict[str, Any] = {
        "slide": str(source.path),
        "slide_bytes": None if stat is None else stat.st_size,
        "mpp_given": mpp_given,
        "metadata": dict(source.metadata),
    }
    if label_map := source.metadata.get("label_map"):
        facts["label_map_sha256"] = [_sha256(path) for path in label_map_files(label_map)]
    return facts


def _sha256(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except (OSError, ValueError):  # reading it will say what is wrong with it
        return None


def _tiles(source: SlideSource, spec: TileSpec, slide: Slide, overview: Overview, mask: Mask) -> pd.DataFrame:
    """Every tile of the grid with its tissue fraction and metadata."""
    grid = tile_grid(
        slide.dimensions,
        slide.mpp,
        mpp=spec.mpp,
        tile_px=spec.tile_px,
        stride_px=spec.stride_px,
        border=spec.border,
    )
    columns: dict[str, Any] = {
        "slide_id": source.slide_id,
        "path": str(source.path),
        "x": grid.x,
        "y": grid.y,
        "mpp": spec.mpp,
        "mpp_level0": slide.mpp,
        "tile_px": spec.tile_px,
        "tissue_fraction": tissue_fraction(
            mask, grid.x, grid.y, mask_downsample=overview.downsample, tile_level0=grid.side
        ),
        "flag": "",
    }
    frame = pd.DataFrame(columns, index=range(len(grid.x)))
    for name, value in source.metadata.items():
        if name != "label_map":
            frame[name] = value
    label_map = source.metadata.get("label_map")
    if label_map:
        classes, mpp, names = read_label_map(label_map)
        labels = tile_labels(classes, mpp, grid.x, grid.y, slide.mpp, spec.tile_um)
        frame["label"] = np.array([*names, ""], dtype=object)[labels.label]
        frame["label_share"] = labels.share
    return frame


def _remarks(n_grid: int, n_kept: int, overview: Overview, mask: Mask) -> Iterator[str]:
    """What a user should know about a slide that went through."""
    if overview.unreadable.any():
        yield (f"{overview.unreadable.mean():.1%} of the overview cannot be read; tiles there are kept untested.")
    if n_grid == 0:
        yield "The slide is smaller than one tile."
    elif not mask.any():
        yield "No tissue was found; look at the overlay."
    elif n_kept == 0:
        yield f"None of {n_grid} tiles holds enough tissue; look at the overlay or lower --min-tissue."


def _left_out(sources: list[SlideSource], out: Path) -> Iterator[str]:
    """Says of slides that earlier runs, or others meanwhile, tiled into OUT that the manifest is without them."""
    others = {path.stem for path in (out / "tiles").glob("*.parquet")} - {source.slide_id for source in sources}
    if others:
        yield (
            f"{out}/manifest.parquet holds the slides of this run; {len(others)} tiled there before are not in it "
            f"({min(others)} is one): name all slides in one run to have them together, those done are skipped."
        )


def _tile_or_reuse(source: SlideSource, spec: TileSpec, out: Path, done: bool) -> Outcome:
    """The slide's outcome; what is wrong with one slide becomes its row, what is wrong with OUT is raised."""
    started = time.monotonic()
    if done:
        earlier = TileManifest.read(_tiles_path(out, source.slide_id))
        said = {name: value for name, value in earlier.facts.items() if name != MARKS}
        return _outcome(source, "skipped", len(earlier.frame), started, **said)
    try:
        return tile_slide(source, spec, out)
    except (SlideError, ManifestError) as error:
        for leftover in _slide_paths(out, source.slide_id):
            leftover.unlink(missing_ok=True)
        return _outcome(source, "failed", 0, started, message=str(error))


def _outcome(
    source: SlideSource,
    status: Literal["ok", "failed", "skipped"],
    n_tiles: int,
    started: float,
    *,
    mpp_level0: float = float("nan"),
    mpp_source: str = "",
    message: str = "",
) -> Outcome:
    seconds = round(time.monotonic() - started, 2)
    return Outcome(source.slide_id, str(source.path), status, n_tiles, mpp_level0, mpp_source, seconds, message)


def _is_done(source: SlideSource, spec: TileSpec, out: Path) -> bool:
    """True if an earlier run finished this slide with these settings; StoreError if with others, or another slide."""
    path = _tiles_path(out, source.slide_id)
    if not path.exists():
        return False
    try:
        header = read_header(path)
    except ManifestError:
        # Truncated, or not ours: redo it.
        return False
    given = source.mpp
    if given is None and header.get("settings", {}).get("mpp_given") is not None:
        given = source.mpp_else  # a slide that said its own then says so now
    check_header(header, TileManifest(empty_frame(), spec, source_facts(source, given)).header, path)
    tiled = header.get("facts", {}).get(MARKS, {}).get(source.slide_id)  # early files do not say
    if tiled is not None and tiled != file_mark(source.path):
        raise StoreError(
            f"{source.path} is not the file that {path} was made of, though as large: pass --overwrite to redo its "
            "tiles, or choose another output folder."
        )
    return True


def _results(futures: dict[Future[Outcome], SlideSource]) -> Iterator[Outcome]:
    for future in as_completed(futures):
        yield future.result()


def _slide_paths(out: Path, slide_id: str) -> tuple[Path, Path, Path]:
    """Where a slide's tiles, outlines and overlay go."""
    return (
        out / "tiles" / f"{slide_id}.parquet",
        out / "geojson" / f"{slide_id}.geojson",
        out / "overlays" / f"{slide_id}.jpg",
    )


def _tiles_path(out: Path, slide_id: str) -> Path:
    return _slide_paths(out, slide_id)[0]


def _merge(frames: list[pd.DataFrame], sources: list[SlideSource]) -> pd.DataFrame:
    """All tiles in the order of the sources; metadata that a slide lacks is empty."""
    if not frames:
        return empty_frame()
    order = {source.slide_id: i for i, source in enumerate(sources)}
    filled = [frame for frame in frames if len(frame)] or frames[:1]
    merged: pd.DataFrame = pd.concat(filled)
    return typed(merged.sort_values("slide_id", key=lambda ids: ids.map(order), kind="stable"))
