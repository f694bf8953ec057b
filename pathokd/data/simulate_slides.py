"""The same slides as other laboratories and scanners would show them, as pyramidal TIFFs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pathokd.augment.stain_math import Appearance
from pathokd.data.conditions import MEASURED_TILES, ORIGINAL, SIMULATION, Condition, appearance_of, noise_seed
from pathokd.data.sample import tissue_tiles
from pathokd.errors import ManifestError, SlideError, StoreError
from pathokd.files import Header, check_header, file_mark, make_header, remove_leftovers, write_json, write_text
from pathokd.phantom.pyramid import write_strips
from pathokd.progress import Bars
from pathokd.slides.slide import Slide
from pathokd.slides.sources import SlideSource, check_slide_id
from pathokd.types import Mpp, Rgb

BLOCK_PX = 1024
LISTED = ("slide_id", "path", "case", "stain", "scanner")
"""First columns of `slides.csv`; what else is known of a slide follows."""
HALO_PX = 32
"""Pixels around a block that are simulated along and thrown away; a multiple of 16 keeps JPEG's blocks aligned."""


class SlideOutcome(NamedTuple):
    """One row of what `simulate_slides` did."""

    slide_id: str
    path: str
    case: str
    stain: str
    scanner: str
    status: str
    message: str


def simulate_slides(
    slides: Sequence[SlideSource],
    out_dir: str | Path,
    wanted: Sequence[Condition],
    *,
    seed: int = 0,
    quality: int = 90,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Write every slide under every condition as a pyramidal TIFF that OpenSlide reads, and a list `slides.csv`
    with everything the list of slides said of them.

    Level 0 is that of the slide, and so are its microns per pixel. A slide that cannot be read is one failed row.

    Args:
        slides: slides.
        out_dir: gets `SLIDE_STAIN_SCANNER.tif` and `slides.csv`; files that are there are kept, and stay listed.
        wanted: conditions.
        seed: of all noise.
        quality: JPEG quality of the files.
        overwrite: write anew.

    Returns:
        One row per slide and condition.

    Raises:
        ValueError: `quality` or `seed` is out of range.
        StoreError: `out_dir` was made with other settings or from other slides of these names, or the disk is full.
    """
    out, outcomes = Path(out_dir), []
    if not 1 <= quality <= 100:
        raise ValueError(f"quality of slides, which are JPEG, must lie in 1..100, got {quality}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    settings = {"severity": wanted[0].severity, "seed": seed, "quality": quality, "simulation": SIMULATION}
    _claim(out / "simulated.json", make_header("simulated-slides/2", settings), slides, wanted, overwrite)
    remove_leftovers(out, "*.tif")
    listed = _listed_before(out)
    with Bars() as bars:
        jobs = [(source, condition) for source in slides for condition in wanted]
        for source, condition in bars.track(jobs, "simulating slides", len(jobs)):
            path = out / _file_name(source, condition)
            message = ""
            if not path.exists():
                try:
                    _check_name(path)
                    _simulate_slide(source, path, condition, seed, quality, bars)
                except SlideError as error:
                    message = str(error)
                    bars.say(f"{source.slide_id}: {message}")
            known = source.metadata
            stain = condition.stain or known.get("stain") or ORIGINAL
            scanner = known.get("scanner") or ORIGINAL if condition.scanner is None else condition.scanner_name
            case = known.get("case") or source.slide_id
            outcomes.append(
                SlideOutcome(path.stem, path.name, case, stain, scanner, "failed" if message else "ok", message)
            )
            if not message:
                listed[path.name] = {**known, **dict(zip(LISTED, outcomes[-1], strict=False))}
    columns = [*LISTED, *dict.fromkeys(name for row in listed.values() for name in row if name not in LISTED)]
    write_text(out / "slides.csv", pd.DataFrame(list(listed.values()), columns=columns).to_csv(index=False))
    return pd.DataFrame(outcomes, columns=list(SlideOutcome._fields))


def _listed_before(out: Path) -> dict[str, dict[str, str]]:
    """Rows of `slides.csv` by file: what earlier runs made of other slides or conditions, where it is still there."""
    if not (out / "slides.csv").exists():
        return {}
    frame = pd.read_csv(out / "slides.csv", dtype=str, keep_default_na=False)
    rows = [{str(name): text for name, text in row.items() if text} for row in frame.to_dict("records")]
    return {row["path"]: row for row in rows if (out / row["path"]).exists()}


def _claim(
    path: Path, header: Header, slides: Sequence[SlideSource], wanted: Sequence[Condition], overwrite: bool
) -> None:
    """Refuse a folder of other settings, slides or profiles of the same names; note what will be made from what.

    To overwrite, whatever this folder's runs made is deleted first: a run cut off then leaves none of it to be kept.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it and pass --overwrite.") from error
    made_of = {source.slide_id: _made_of(source) for source in slides}
    edited = {condition.scanner_name: condition.edited for condition in wanted if condition.edited}
    files = {_file_name(source, condition) for source in slides for condition in wanted}
    if overwrite:
        _delete(path.parent, {*found.get("files", []), *files}, slides)
    elif found:
        check_header(found, header, path)
        for name, facts in made_of.items():
            known = found["slides"].get(name, facts)
            # Of a slide that could not be read before there is nothing that another one could be mixed with.
            if what := next((fact for fact in facts if known[fact] not in (None, facts[fact])), None):
                raise StoreError(
                    f"{path.parent} holds {name} made from {what} {known[what]}, this run gives {facts[what]}: pass "
                    "--overwrite to make it anew, or another output folder."
                )
        for name, numbers in edited.items():
            if found["profiles"].get(name, numbers) != numbers:
                raise StoreError(
                    f"{path.parent} holds slides of another scanner profile {name}: pass --overwrite to make them "
                    "anew, or another output folder."
                )
        made_of, edited = {**found["slides"], **made_of}, {**found["profiles"], **edited}
        files |= {*found["files"]}
    write_json(path, {**header, "slides": made_of, "profiles": edited, "files": sorted(files)})


def _made_of(source: SlideSource) -> dict[str, str | float | None]:
    """What a slide's files depend on besides the settings; None for what cannot be told."""
    try:
        with source.open() as slide:
            mpp: Mpp | None = slide.mpp
    except SlideError:  # simulating it will say what is wrong with it
        mpp = None
    return {"path": str(source.path), "contents": file_mark(source.path), "microns per pixel": mpp}


def _file_name(source: SlideSource, condition: Condition) -> str:
    return f"{source.slide_id}_{condition.name}.tif"


def _delete(out: Path, names: Iterable[str], slides: Sequence[SlideSource]) -> None:
    """Delete the list of slides and files beside it, but no file that is to be read."""
    inputs = {source.path.resolve() for source in slides}
    files = [out / name for name in names if Path(name).name == name]
    if taken := next((file for file in files if file.resolve() in inputs), None):
        raise StoreError(f"{taken} was made by `pathokd simulate` and is given to it too: name another output folder.")
    for file in [out / "slides.csv", *files]:
        file.unlink(missing_ok=True)


def _check_name(path: Path) -> None:
    """Refuse a name that would be written, but is too long to be tiled afterwards."""
    try:
        check_slide_id(path.stem)
    except ManifestError as error:
        raise SlideError(f"{error} A CSV list can give the slide a shorter slide_id.") from error


def _simulate_slide(source: SlideSource, path: Path, condition: Condition, seed: int, quality: int, bars: Bars) -> None:
    with source.open() as slide:
        restained = condition.stain is not None
        appearance = appearance_of(slide.path.name, tissue_tiles(slide, MEASURED_TILES), restained=restained)
        width, height = slide.dimensions
        rows = range(0, height, BLOCK_PX)
        strips = (_strip(slide, top, condition, appearance, seed) for top in rows)
        shown = bars.track(strips, path.stem, len(rows), keep=False)
        write_strips(path, shown, (width, height), slide.mpp, strip_px=BLOCK_PX, quality=quality)


def _strip(slide: Slide, top: int, condition: Condition, appearance: Appearance, seed: int) -> Rgb:
    """One full-width strip of level 0, block by block, each with a halo."""
    width, height = slide.dimensions
    bottom = min(top + BLOCK_PX, height)
    blocks = []
    for left in range(0, width, BLOCK_PX):
        right = min(left + BLOCK_PX, width)
        size = (right - left + 2 * HALO_PX, bottom - top + 2 * HALO_PX)
        block = slide.read_area(left - HALO_PX, top - HALO_PX, 1.0, size)
        changed = condition.apply(block, appearance, noise_seed(seed, top * width + left))
        blocks.append(changed[HALO_PX : HALO_PX + bottom - top, HALO_PX : HALO_PX + right - left])
    return np.concatenate(blocks, axis=1)
