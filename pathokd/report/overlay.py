"""Each slide of a folder of embeddings as a sheet: tissue and tiles, and beside them what a model takes for alike."""

import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from pathokd.embed.colours import ColourSpace, fit_colours
from pathokd.embed.outcomes import Outcome, check_place, conclude
from pathokd.embed.painting import paint_tiles
from pathokd.embed.store import SlideEmbeddings, read_embeddings, read_header
from pathokd.embed.verify import Expected, differs, expected_slides
from pathokd.errors import ManifestError, PathokdError, SlideError, StoreError
from pathokd.files import Header, atomic_path, check_header, fingerprint, make_header
from pathokd.progress import Bars
from pathokd.report.slide_sheet import Panel, slide_sheet
from pathokd.slides.manifest import TileSpec
from pathokd.slides.overlay import OUTLINE, TILE, UNREADABLE, draw_overlay
from pathokd.slides.slide import Slide
from pathokd.slides.sources import find_slides
from pathokd.slides.tile import MASK_MAX_PX, find_tissue
from pathokd.types import FloatArray, IntArray, Rgb

SCHEMA = "overlay/1"
PICTURE_MAX_PX = 1200
"""Longest side of a picture on the sheet."""
QUALITY = 90


class _Job(NamedTuple):
    row: Expected
    features: Path
    picture: Path
    header: Header
    done: bool


def draw_overlays(
    features: str | Path, out_dir: str | Path, *, slides: str | Path | None = None, overwrite: bool = False
) -> pd.DataFrame:
    """Draw OUT/SLIDE_ID.jpg for every slide of a folder of embeddings, or for one file.

    Left: the slide, its tissue outlined, tiles, flagged tiles crossed out. Right: each good tile in a colour, the
    three strongest principal components of the features over all good tiles of the folder as red, green and blue, so
    that like colours mean like features on every sheet. A slide that cannot be drawn is a failed row.

    Args:
        features: The folder that `pathokd embed` wrote, or one of its files (whose colours are then its own).
        out_dir: Gets the pictures and summary.csv.
        slides: Folder the slides lie in now, if they are no longer where they were embedded from.
        overwrite: Draw again what is there.

    Returns:
        The summary: slide_id, path, status (ok, failed, skipped), n_tiles, n_flagged, seconds, message.

    Raises:
        StoreError: There are no embeddings; or `out_dir` holds pictures of other embeddings, or of something else,
            and `overwrite` is not set.
        ManifestError: `slides` holds no slide.
    """
    given, out = Path(features), Path(out_dir)
    check_place(out, "overlay")
    moved = None if slides is None else _by_name(Path(slides))
    jobs, outcomes = _plan(given, out, overwrite)
    todo = [job for job in jobs if not job.done]
    with Bars() as bars:
        space = _colours([job.features for job in jobs], bars) if todo else None
        for job in bars.track(jobs, "Slides", len(jobs)):
            outcomes[job.row.slide_id] = _draw(job, space, moved, len(jobs))
        return conclude(outcomes.values(), out, bars)


def _plan(given: Path, out: Path, overwrite: bool) -> tuple[list[_Job], dict[str, Outcome]]:
    """What is to be drawn, and an outcome for every slide, failed until it is."""
    root = given if given.is_dir() else given.parent
    if not given.is_dir():
        read_header(given)
    rows = [row for row in expected_slides(root) if given.is_dir() or row.slide_id == given.stem]
    headers: dict[str, Header] = {}
    outcomes: dict[str, Outcome] = {}
    for row in rows:
        path, reason = root / f"{row.slide_id}.h5", "The run was cut off."
        try:
            if row.status == "failed" and not path.exists():
                raise StoreError(row.message)
            header = read_header(path)
            first = next(iter(headers.values()), header)
            if other := differs(header["settings"], first["settings"]):
                raise StoreError(f"{other} One folder should hold one model.")
            headers[row.slide_id] = header
        except StoreError as error:
            reason = str(error)
        outcomes[row.slide_id] = Outcome(row.slide_id, row.path, "failed", 0, 0, 0.0, reason)
    cohort = fingerprint([header["settings"] for header in headers.values()])
    jobs = []
    for row in rows:
        if row.slide_id in headers:
            settings = {**headers[row.slide_id]["settings"], "picture_px": PICTURE_MAX_PX, "cohort": cohort}
            if "slide" in headers[row.slide_id]:
                settings["slide"] = headers[row.slide_id]["slide"]
            header, picture = make_header(SCHEMA, settings), out / f"{row.slide_id}.jpg"
            done = not overwrite and _is_done(picture, header)
            jobs.append(_Job(row, root / f"{row.slide_id}.h5", picture, header, done))
    return jobs, outcomes


def _is_done(picture: Path, header: Header) -> bool:
    """Whether a picture was drawn from these embeddings; StoreError if from others, or if it is none of ours."""
    if not picture.exists():
        return False
    try:
        with Image.open(picture) as image:
            found = json.loads(image.info.get("comment", b""))
    except (OSError, ValueError):
        found = {}
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise StoreError(
            f"{picture} is there and is no picture of `pathokd overlay`: name another folder, or pass --overwrite "
            "to replace it."
        )
    check_header(found, header, picture)
    return True


def _colours(files: list[Path], bars: Bars) -> ColourSpace | None:
    """The colours of all good tiles; None if not one file can be read."""

    def parts() -> Iterable[FloatArray]:
        for path in bars.track(files, "Colours", len(files), keep=False):
            try:
                found = read_embeddings(path)
            except StoreError:
                continue  # becomes a failed row when it is drawn
            yield found.features[found.good]

    try:
        return fit_colours(parts)
    except ValueError:
        return None


def _draw(job: _Job, space: ColourSpace | None, moved: dict[str, list[Path]] | None, n_slides: int) -> Outcome:
    """Draw one slide, turning what goes wrong in the world into one failed row."""
    row, started = job.row, time.monotonic()
    where = row.path
    try:
        found = read_embeddings(job.features)
        n, flagged = int(found.good.sum()), int((~found.good).sum())
        if job.done:
            return Outcome(row.slide_id, where, "skipped", n, flagged, 0.0, "")
        path = _locate(row, moved)
        where = str(path)
        if space is None:
            raise StoreError("No tile has features to colour by.")
        _write(job, _sheet(row.slide_id, path, found, space, n_slides))
    except PathokdError as error:
        return Outcome(row.slide_id, where, "failed", 0, 0, round(time.monotonic() - started, 2), str(error))
    return Outcome(row.slide_id, where, "ok", n, flagged, round(time.monotonic() - started, 2), "")


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Slides of a folder by file name and by the name `pathokd tile` would give them."""
    if not folder.is_dir():
        raise ManifestError(f"{folder} is no folder: --slides takes the folder that the slides lie in now.")
    found: dict[str, list[Path]] = {}
    for source in find_slides(folder):
        for name in {source.path.name, source.slide_id}:
            found.setdefault(name, []).append(source.path)
    return found


def _locate(row: Expected, moved: dict[str, list[Path]] | None) -> Path:
    """Where the slide lies now."""
    name = Path(row.path).name or row.slide_id
    if moved is None:
        if row.path and Path(row.path).exists():
            return Path(row.path)
        where = f"{row.path} is not there" if row.path else f"Where the slide {row.slide_id} lies is not recorded"
        raise SlideError(f"{where}: give the folder it lies in now, --slides FOLDER.")
    found = moved.get(name) or moved.get(row.slide_id) or []
    if len(found) == 1:
        return found[0]
    if not found:
        raise SlideError(f"{name} is not in the folder of --slides: give the folder it lies in.")
    raise SlideError(f"{name} is there {len(found)} times ({found[0]}, {found[1]}): give a narrower --slides.")


def _sheet(slide_id: str, path: Path, found: SlideEmbeddings, space: ColourSpace, n_slides: int) -> Rgb:
    attrs, settings = found.coords_attrs, found.header["settings"]
    with Slide(path, mpp=float(attrs["mpp_level0"]), icc=bool(settings.get("icc"))) as slide:
        size = (int(attrs["level0_width"]), int(attrs["level0_height"]))
        if slide.dimensions != size:
            raise SlideError(
                f"{path} has {slide.dimensions[0]} x {slide.dimensions[1]} px and the embeddings were made on "
                f"{size[0]} x {size[1]}: it is another slide, give the folder of the right one, --slides FOLDER."
            )
        picture = slide.overview(max_px=PICTURE_MAX_PX)
        overview = slide.overview(mpp=TileSpec.mask_mpp, max_px=MASK_MAX_PX)
        mask = find_tissue(overview, slide.mpp)
    good, side = found.good, float(attrs["patch_size_level0"])
    tiles = draw_overlay(picture, mask, overview.downsample, found.coords[good, 0], found.coords[good, 1], side)
    tiles = _cross_out(tiles, found.coords[~good] / picture.downsample, side / picture.downsample)
    n, flagged = int(good.sum()), int((~good).sum())
    legend = [(OUTLINE, "tissue"), (TILE, f"{n:,} tiles")]
    if flagged:
        solid = "; solid where the file cannot be read" if picture.unreadable.any() else ""
        legend.append((UNREADABLE, f"{flagged:,} flagged, no features{solid}"))
    shares = ", ".join(f"{share:.0%}" for share in space.share)
    of = f"{n_slides:,} slides" if n_slides > 1 else "this slide"
    caption = (
        f"Three principal components over all {space.n_tiles:,} tiles of {of} as red, green and blue ({shares} of the "
        "variance): like colours, like features."
    )
    facts = (
        f"{found.features_attrs['encoder']}, {found.features.shape[1]} dimensions; tiles of {attrs['patch_size']} px "
        f"at {float(attrs['mpp_target']):g} µm/px"
    )
    colours = paint_tiles(picture, found.coords, attrs, space.colours(found.features, good), good)
    panels = [Panel(tiles, "Tissue and tiles", "", legend), Panel(colours, "Features", caption)]
    return slide_sheet(slide_id, facts, panels, float(attrs["mpp_level0"]) * picture.downsample)


def _cross_out(picture: Rgb, corners: FloatArray, side: float) -> Rgb:
    """Mark squares with a red cross."""
    canvas = picture.copy()
    places: IntArray = np.round(np.asarray(corners)).astype(np.int64)
    width = max(round(side) - 1, 1)
    for x, y in places.tolist():
        cv2.rectangle(canvas, (x, y), (x + width, y + width), UNREADABLE, 2)
        cv2.line(canvas, (x, y), (x + width, y + width), UNREADABLE, 2, cv2.LINE_AA)
        cv2.line(canvas, (x, y + width), (x + width, y), UNREADABLE, 2, cv2.LINE_AA)
    return canvas


def _write(job: _Job, sheet: Rgb) -> None:
    """JPEG with the header as its comment."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": QUALITY, "subsampling": 0, "comment": json.dumps(job.header)}
    Image.fromarray(sheet).save(buffer, "JPEG", **options)
    with atomic_path(job.picture) as part:
        part.write_bytes(buffer.getvalue())
