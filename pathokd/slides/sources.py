"""From a folder, a glob, a file or a CSV to a list of slides with unique names."""

import csv
import glob
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pathokd.errors import ManifestError
from pathokd.slides.dicom import series_uid
from pathokd.slides.manifest import COLUMNS, LABEL_COLUMNS
from pathokd.slides.picture import SUFFIXES as PICTURES
from pathokd.slides.slide import Slide
from pathokd.types import Mpp

SUFFIXES = (
    ".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .dcm .czi .zvi .avs".split()  # noqa: SIM905
)
"""File name endings that count as slides in a folder (case does not matter); pictures must be named or
globbed, since label maps and overlays are pictures too."""

ALIASES = {
    "slide_id": ("slide_id", "sample_id", "name"),
    "path": ("path", "wsi", "image_path", "slide_path", "slide", "filename"),
    "mpp": ("mpp", "spacing_at_level_0", "mpp_level0"),
}
"""CSV column names that other tools use for the same thing, in order of preference."""

PACKED_COLUMNS = ("key", "shard", "offset", "size")
"""Columns that `pathokd pack` adds to a manifest's."""

_BEYOND = "\0beyond"
"""Where cells go that stand under no column."""

LONGEST_ID = 200
"""Bytes of a slide_id: file systems take names of 255, and temporary names add an ending."""


@dataclass(frozen=True)
class SlideSource:
    """A slide to be tiled: where it is, what it is called, and what is known about it.

    Args:
        slide_id: unique within a run; names the output files.
        path: absolute.
        mpp: microns per level-0 pixel from a CSV, whatever the file says, or None to take the file's.
        metadata: further columns, carried into the manifest. `label_map` (an absolute path) is used, not
            carried.
        mpp_else: microns per level-0 pixel if neither `mpp` nor the file says.
    """

    slide_id: str
    path: Path
    mpp: Mpp | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    mpp_else: Mpp | None = None

    def open(self, *, icc: bool = False) -> Slide:
        """The slide, with the pixel size that is known of it; see `Slide`."""
        return Slide(self.path, mpp=self.mpp, icc=icc, mpp_else=self.mpp_else)


def find_slides(sources: str | Path | Sequence[str | Path], *, mpp: Mpp | None = None) -> list[SlideSource]:
    """List the slides of folders (searched in depth), globs, slide files and CSV files, each file once.

    Of the files of a DICOM series, which are one slide, the first is taken, unless a CSV calls them by ids or describes
    them. Slides without an id of their own are called by their file name without its ending; where that gives two
    slides one name, both get a short hash of their path.

    Args:
        sources: one or several of the above.
        mpp: microns per level-0 pixel for slides where neither a CSV nor the file says (`--mpp-level0`).

    Raises:
        ManifestError: nothing is found in one of them, a CSV lacks a path column, or two rows share a `slide_id`.
    """
    items = [sources] if isinstance(sources, str | Path) else list(sources)
    found: dict[Path, SlideSource] = {}
    for item in items:
        here = list(_expand(item))
        if not here:
            raise _no_slides(str(item))  # also beside others, whose slides would hide it
        for source in here:
            # A folder says nothing of a slide that a CSV beside it describes, whichever is named first.
            if source.path not in found or found[source.path] == _bare(source.path):
                found[source.path] = source
    if not found:
        raise _no_slides("an empty list")
    named = _with_unique_ids(_one_per_series(list(found.values())))
    return [replace(source, mpp_else=mpp) for source in named]


def _one_per_series(sources: list[SlideSource]) -> list[SlideSource]:
    """Leave one file of each DICOM series in a folder: it stands for the slide, whose levels are files of their own."""
    dicoms = [s.path for s in sources if s.path.suffix.lower() == ".dcm" and not (s.slide_id or s.metadata)]
    beside = Counter(path.parent for path in dicoms)
    seen: set[tuple[Path, str]] = set()
    again: set[Path] = set()
    for path in dicoms:
        series = series_uid(path) if beside[path.parent] > 1 else None
        if series is not None:
            again |= {path} if (path.parent, series) in seen else set()
            seen.add((path.parent, series))
    return [source for source in sources if source.path not in again]


def _no_slides(where: str) -> ManifestError:
    expected = f"expected a folder, glob, slide file or CSV with files ending in {' '.join(SUFFIXES)}."
    if (Path(where) / "index.parquet").is_file():
        expected = "it is a packed folder, of tiles without their slides; give the slides, or the tiled folder."
    return ManifestError(f"No slides in {where}: {expected}")


def _expand(item: str | Path) -> Iterable[SlideSource]:
    path = _expanded(item)
    if path.is_dir():
        return _from_files(sorted(p for p in path.rglob("*") if _is_slide(p, path)))
    if path.is_file():
        return read_slide_csv(path) if path.suffix.lower() == ".csv" else _from_files([path])
    if glob.has_magic(str(item)):
        matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        return _from_files([p for p in matches if p.is_file() and p.suffix.lower() in (*SUFFIXES, *PICTURES)])
    raise ManifestError(f"{item} does not exist: expected a folder, glob, slide file or CSV.")


def _is_slide(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def _from_files(paths: Iterable[Path]) -> list[SlideSource]:
    return [_bare(path.absolute()) for path in paths]


def _bare(path: Path) -> SlideSource:
    """A slide of which nothing is known but its file."""
    return SlideSource("", path)


def read_slide_csv(path: Path) -> list[SlideSource]:
    """Read a slide list: a path column, and optionally `slide_id`, `mpp`, `label_map` and any metadata
    columns.

    Relative paths are relative to the CSV. Column names of other tools are understood (see `ALIASES`). Files
    need not exist yet: a missing one becomes a failed row of the run.

    Raises:
        ManifestError: not UTF-8, no path column, an empty path, an mpp that is no number, a row of too many cells, two
            rows that contradict each other, or a column that is there twice or that a manifest reserves.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            reader.restkey = _BEYOND
            rows, too_long = [], []
            for row in reader:
                too_long += [reader.line_num] * any(cell.strip() for cell in row.pop(_BEYOND, []))
                rows.append({name: (cell or "").strip() for name, cell in row.items()})
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path} is no table in UTF-8 ({error}): save it as a CSV in UTF-8.") from error
    columns = {field: next((a for a in names if a in header), None) for field, names in ALIASES.items()}
    if columns["path"] is None:
        raise ManifestError(
            f"{path} has the columns {', '.join(header) or '(none)'}: "
            f"expected one of {', '.join(ALIASES['path'])} with each slide's path."
        )
    free = [name for name in header if name and name not in columns.values()]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise ManifestError(f"{path} has two columns {twice[0]}: rename one of them.")
    own = (*COLUMNS, *PACKED_COLUMNS)
    reserved = [n for n in free if n in own or (n in LABEL_COLUMNS and "label_map" in header)]
    if reserved:
        raise ManifestError(
            f"{path} has the column {reserved[0]}, which manifests or packed tiles use themselves: rename it."
        )
    if too_long:
        raise ManifestError(
            f"{path}, line {too_long[0]}: there are more cells than columns, so some stand in the wrong one; put a "
            'cell that holds a comma into quotes ("HE, pale").'
        )
    listed = [_csv_row(path, number, row, columns, free) for number, row in enumerate(rows, start=2)]
    known: dict[Path, SlideSource] = {}
    for source in listed:
        if known.setdefault(source.path, source) != source:
            raise ManifestError(
                f"{path} has two rows of {source.path} that say different things of it, and a slide is tiled once: "
                "correct the path of one, or remove a row."
            )
    return listed


def _csv_row(
    csv_path: Path, number: int, row: dict[str, str], columns: dict[str, str | None], free: list[str]
) -> SlideSource:
    def cell(name: str) -> str:
        column = columns[name]
        return "" if column is None else row.get(column, "")

    if not cell("path"):
        raise ManifestError(f"{csv_path}, line {number}: the path is empty; fill it in or remove the line.")
    try:
        mpp = float(cell("mpp")) if cell("mpp") else None
    except ValueError as error:
        raise ManifestError(
            f"{csv_path}, line {number}: mpp is {cell('mpp')!r}, expected microns per pixel such as 0.25, or nothing."
        ) from error
    metadata = {name: row.get(name, "") for name in free}
    if metadata.get("label_map"):
        metadata["label_map"] = str(_beside(csv_path, metadata["label_map"]))
    return SlideSource(cell("slide_id"), _beside(csv_path, cell("path")), mpp, metadata)


def _beside(csv_path: Path, name: str) -> Path:
    return (csv_path.absolute().parent / _expanded(name)).absolute()


def _expanded(name: str | Path) -> Path:
    """With the home folder for `~`; a name such as `~7.svs`, which is nobody's home, stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _with_unique_ids(sources: list[SlideSource]) -> list[SlideSource]:
    """Fill in ids. They become file names, also on disks that ignore case, so they are compared without
    it."""
    for source in sources:
        if source.slide_id:
            check_slide_id(source.slide_id)
    given = Counter(s.slide_id.casefold() for s in sources if s.slide_id)
    for name, count in given.items():
        if count > 1:
            raise ManifestError(
                f"{count} slides have the slide_id {name!r}: give each its own, or leave the cells empty."
            )
    stems = Counter(_stem(s.path).casefold() for s in sources if not s.slide_id)
    named = []
    for source in sources:
        name = source.slide_id or _stem(source.path)
        if not source.slide_id:
            digest = hashlib.sha256(str(source.path).encode(errors="surrogateescape")).hexdigest()[:8]
            if len(name.encode(errors="replace")) > LONGEST_ID:
                name = f"{name[: (LONGEST_ID - len(digest) - 1) // 4]}-{digest}"  # a letter takes up to four bytes
            elif stems[name.casefold()] > 1 or name.casefold() in given:
                name = f"{name}-{digest}"
            _check_path(source.path, name)
        named.append(SlideSource(name, source.path, source.mpp, source.metadata))
    return named


def _check_path(path: Path, name: str) -> None:
    """Raise ManifestError, naming the file, if its name cannot become an id or be written into a table."""
    try:
        str(path).encode()
        check_slide_id(name)
    except (UnicodeEncodeError, ManifestError) as error:
        raise ManifestError(f"{str(path)!r} cannot be listed ({error}); rename it.") from error


def check_slide_id(slide_id: str) -> None:
    """Raise ManifestError if `slide_id` cannot name a file, or would name one in another folder."""
    try:
        too_long = len(slide_id.encode()) > LONGEST_ID
    except UnicodeEncodeError as error:
        raise ManifestError(f"slide_id {slide_id!r} holds bytes that are no UTF-8: rename the slide.") from error
    odd = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in slide_id)
    if not slide_id or slide_id.startswith(".") or odd or "/" in slide_id or "\\" in slide_id:
        raise ManifestError(
            f"slide_id {slide_id!r} cannot name a file: leave out slashes, leading dots and control characters."
        )
    if too_long:
        raise ManifestError(f"slide_id {slide_id[:20]!r}... is longer than {LONGEST_ID} bytes: shorten it.")


def _stem(path: Path) -> str:
    """File name without its ending; `.ome` goes with `.tif`."""
    return path.stem.removesuffix(".ome") or path.name
