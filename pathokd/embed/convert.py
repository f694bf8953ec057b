"""A folder of embeddings in the layout another tool reads: slide by slide, resumable, nothing mixed."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pandas as pd

from pathokd.embed.annotated import require_anndata
from pathokd.embed.layouts import LAYOUTS, LayoutName, Source, stored_header
from pathokd.embed.outcomes import Outcome, check_place, conclude
from pathokd.embed.store import read_embeddings, read_outline
from pathokd.embed.verify import ONE_MODEL, differs, expected_slides
from pathokd.errors import PathokdError, StoreError
from pathokd.files import Header, atomic_path, check_header, fingerprint, make_header, write_json
from pathokd.progress import Bars

SCHEMA = "converted/2"
RECORD = "export.json"
"""In the output folder: its header, and every file of it."""


class _Job(NamedTuple):
    """One slide's work."""

    source: Source
    path: Path
    header: Header
    files: list[str]
    n_tiles: int
    n_flagged: int


def convert_embeddings(
    folder: str | Path, out_dir: str | Path, layout: LayoutName, *, overwrite: bool = False
) -> pd.DataFrame:
    """Write the embeddings of a folder as TRIDENT, CLAM or STAMP would have, as AnnData or as Parquet.

    Flagged tiles are left out, since their features are NaN; Parquet keeps them as rows without features, and AnnData
    lists them in uns["pathokd"]["flagged"]. Slides that the run of `pathokd embed` names but that have no file, that
    are damaged, or that are of another model than the first, become failed rows. A slide whose files were made from
    the same embeddings is skipped. Files of earlier runs are kept, so several folders can be brought together in one,
    and told of where this run has no such slide.

    Args:
        folder: What `pathokd embed` wrote.
        out_dir: Gets the files, `summary.csv` and `export.json`, which lists them.
        layout: Who is to read them.
        overwrite: Do everything again, and remove what an earlier conversion to `out_dir` wrote besides.

    Returns:
        The summary: slide_id, path, status (ok, failed, skipped), n_tiles, n_flagged, seconds, message.

    Raises:
        ValueError: No such layout.
        StoreError: `folder` holds no embeddings; `out_dir` holds files of other settings, or of something else, and
            `overwrite` is not set; or the package anndata is wanted and missing. Nothing is done then.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout should be one of {', '.join(get_args(LayoutName))}, got {layout!r}.")
    if layout == "anndata":
        require_anndata()
    root, out = Path(folder), Path(out_dir)
    if out.resolve() == root.resolve():
        raise StoreError(f"{out} is the folder of the embeddings itself: name another folder for the output.")
    check_place(out, "export")
    jobs, outcomes = _plan(root, layout)
    done: set[str] = set()
    if jobs:
        header = _folder_header(jobs[0].header, layout)
        done = _prepare(out, header, jobs, layout, overwrite)
    with Bars() as bars:
        for job in bars.track(jobs, "Slides", len(jobs)):
            outcomes[job.source.slide_id] = _convert(job, out, layout, job.source.slide_id in done)
        for sentence in _left_over(out, jobs):
            bars.say(sentence)
        return conclude(outcomes.values(), out, bars)


def _plan(root: Path, layout: LayoutName) -> tuple[list[_Job], dict[str, Outcome]]:
    """What is to be done, and an outcome for every slide, failed until it is converted."""
    jobs: list[_Job] = []
    outcomes: dict[str, Outcome] = {}
    for row in expected_slides(root):
        path = root / f"{row.slide_id}.h5"
        try:
            if not path.exists():
                missing = f"{path} is not there: run `pathokd embed` again."
                raise StoreError(row.message if row.status == "failed" else missing)
            job = _job(row.slide_id, path, layout)
            if jobs and (other := differs(job.header["settings"], jobs[0].header["settings"])):
                raise StoreError(f"{other} One folder should hold one model.")
        except StoreError as error:
            outcomes[row.slide_id] = Outcome(row.slide_id, str(path), "failed", 0, 0, 0.0, str(error))
            continue
        jobs.append(job)
        outcomes[row.slide_id] = Outcome(row.slide_id, str(path), "failed", 0, 0, 0.0, "The run was cut off.")
    return jobs, outcomes


def _job(slide_id: str, path: Path, layout: LayoutName) -> _Job:
    found = read_outline(path)
    source = Source(slide_id, found.coords_attrs, str(found.features_attrs.get("encoder", "encoder")))
    settings = {"layout": layout, **found.header["settings"], "flags": fingerprint(found.flag.tolist())}
    if "slide" in found.header:
        settings["slide"] = found.header["slide"]
    good = int(found.good.sum())
    files = LAYOUTS[layout].paths(source)
    return _Job(source, path, make_header(SCHEMA, settings), files, good, len(found.flag) - good)


def _folder_header(header: Header, layout: LayoutName) -> Header:
    shared = {name: header["settings"].get(name) for name in ONE_MODEL}
    return make_header(SCHEMA, {"layout": layout, **shared})


def _prepare(out: Path, header: Header, jobs: list[_Job], layout: LayoutName, overwrite: bool) -> set[str]:
    """Check what is there, record what will be, and say which slides are done."""
    record = _read_record(out / RECORD)
    known = set(record.get("files", []))
    planned = [name for job in jobs for name in job.files]
    if overwrite:
        for name in known.difference(planned):
            (out / name).unlink(missing_ok=True)
        known = set()
    else:
        if record:
            check_header(record, header, out / RECORD)
        for name in planned:
            if name not in known and (out / name).exists():
                raise StoreError(
                    f"{out / name} is there and was not written by `pathokd export`: name another folder, "
                    "or pass --overwrite to replace it."
                )
    done = set() if overwrite else {job.source.slide_id for job in jobs if _is_done(job, out, layout)}
    write_json(out / RECORD, {**header, "files": sorted(known.union(planned))})
    return done


def _left_over(out: Path, jobs: list[_Job]) -> Iterator[str]:
    """Says that OUT holds files of earlier runs, of slides that are gone or failed now, or of another folder."""
    planned = {name for job in jobs for name in job.files}
    others = sorted(name for name in _read_record(out / RECORD).get("files", []) if name not in planned)
    others = [name for name in others if (out / name).exists()]
    if others:
        yield (
            f"{out} also holds {len(others)} files of slides that this run did not convert ({others[0]} is one), and "
            "whoever reads the folder takes them too: delete them, or pass --overwrite to have only this run's."
        )


def _read_record(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_done(job: _Job, out: Path, layout: LayoutName) -> bool:
    """Whether the slide's files are there and whole; raises StoreError if they were made from other embeddings."""
    *others, last = (out / name for name in job.files)
    found = stored_header(layout, last)
    if found is None or not all(path.is_file() for path in others):
        return False
    check_header(found, job.header, last)
    return True


def _convert(job: _Job, out: Path, layout: LayoutName, done: bool) -> Outcome:
    """Convert one slide, turning what goes wrong with it into a failed row."""
    slide_id, started = job.source.slide_id, time.monotonic()
    if done:
        return Outcome(slide_id, str(job.path), "skipped", job.n_tiles, job.n_flagged, 0.0, "")
    try:
        contents = LAYOUTS[layout].render(read_embeddings(job.path), job.source, job.header)
        for name, content in zip(job.files, contents, strict=True):
            with atomic_path(out / name) as part:
                part.write_bytes(content)
    except PathokdError as error:
        return Outcome(slide_id, str(job.path), "failed", 0, 0, time.monotonic() - started, str(error))
    seconds = round(time.monotonic() - started, 2)
    return Outcome(slide_id, str(job.path), "ok", job.n_tiles, job.n_flagged, seconds, "")
