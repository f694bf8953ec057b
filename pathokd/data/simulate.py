"""The same tissue as other laboratories and scanners would show it: tiles into a packed folder, slides into pyramids.

Staining comes before scanning, as in life. How a slide is stained is measured once from many of its tiles, so that all
of them are changed alike.
"""

import contextlib
import itertools
import json
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pathokd.augment.scanner import PROFILES, ScannerProfile, get_profile
from pathokd.augment.stain import swap_stain
from pathokd.augment.stain_basis import is_brown, measure_appearance
from pathokd.augment.stain_math import Appearance, to_od
from pathokd.augment.stainings import get_staining
from pathokd.augment.statistics import StainStatistics, fit_statistics
from pathokd.data.batch import TileSource
from pathokd.data.pack import PackResult, PackSpec, pack_source, source_identity
from pathokd.data.packed import PackedTiles
from pathokd.data.targets import slide_marks, tile_identity
from pathokd.errors import ManifestError, SlideError, StoreError
from pathokd.files import (
    Header,
    check_header,
    file_mark,
    fingerprint,
    make_header,
    remove_leftovers,
    write_json,
    write_text,
)
from pathokd.phantom.pyramid import write_strips
from pathokd.progress import Bars
from pathokd.slides.grid import tile_grid
from pathokd.slides.slide import Slide
from pathokd.slides.sources import SlideSource, check_slide_id
from pathokd.slides.tile import find_tissue
from pathokd.slides.tissue import tissue_fraction
from pathokd.types import IntArray, Mpp, Rgb

SIMULATION = 2
"""Version of what a condition makes of pixels: how staining is measured and changed, the presets, the scanner. Raise it
whenever pixels change, so that a folder begun before is not finished with other ones (a test holds it to the pixels).
Folders that say none were made by an earlier one."""
ORIGINAL = "original"
"""In the columns `stain` and `scanner`: as it was."""
MEASURED_TILES = 24
"""Tiles looked at to find how a slide is stained."""
BLOCK_PX = 1024
LISTED = ("slide_id", "path", "case", "stain", "scanner")
"""First columns of `slides.csv`; what else is known of a slide follows."""
HALO_PX = 32
"""Pixels around a block that are simulated along and thrown away; a multiple of 16 keeps JPEG's blocks aligned."""


@dataclass(frozen=True)
class Condition:
    """Another staining, another scanner, or both.

    Args:
        stain: a name in `pathokd.augment.STAININGS`; None keeps the staining.
        scanner: a name in `pathokd.augment.PROFILES` or a YAML file of a profile; None keeps the scanner.
        severity: how far to go, 0 (nothing) to 1.
    """

    stain: str | None = None
    scanner: str | None = None
    severity: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.severity <= 1:
            raise ValueError(f"severity must lie within 0 to 1, got {self.severity}.")
        if self.stain is not None:
            get_staining(self.stain)
        # Read once: a file may be edited while tiles are made.
        object.__setattr__(self, "_profile", None if self.scanner is None else get_profile(self.scanner))

    @property
    def scanner_name(self) -> str:
        """Of the profile; of a file its own name, without what keys and file names cannot hold."""
        if self.scanner is None or self.scanner in PROFILES:
            return self.scanner or ORIGINAL
        name = re.sub(r"[.\s]+", "_", Path(self.scanner).stem)
        return f"{name}-file" if name in (*PROFILES, ORIGINAL) else name

    @property
    def name(self) -> str:
        """For keys and file names."""
        return f"{self.stain or ORIGINAL}_{self.scanner_name}"

    @property
    def profile(self) -> ScannerProfile | None:
        """Of the scanner."""
        return self._profile  # type: ignore[attr-defined, no-any-return]

    @property
    def edited(self) -> str | None:
        """Fingerprint of a profile that is a file, whose name does not tell that it was edited."""
        return None if self.profile is None or self.scanner in PROFILES else fingerprint(self.profile.to_dict())

    def apply(self, rgb: Rgb, source: Appearance, seed: int) -> Rgb:
        """Change one image.

        Args:
            rgb: (height, width, 3).
            source: how its slide is stained.
            seed: of the scanner's noise.
        """
        if self.stain is not None:
            rgb = swap_stain(rgb, source, get_staining(self.stain), self.severity)
        if self.profile is not None:
            rgb = self.profile.apply(rgb, severity=self.severity, seed=seed)
        return rgb


def conditions(stains: Sequence[str], scanners: Sequence[str], severity: float) -> list[Condition]:
    """Every combination of the stainings and scanners named; where none is named, what was is kept."""
    for names in (stains, scanners):
        if len(set(names)) < len(names):
            raise ValueError(f"name each staining and each scanner once, got {', '.join(names)}.")
    both = itertools.product(stains or (None,), scanners or (None,))
    wanted = [Condition(stain, scanner, severity) for stain, scanner in both]
    if len({condition.name for condition in wanted}) < len(wanted):
        raise ValueError(f"two scanners would have one name, got {', '.join(scanners)}: rename one of the files.")
    return wanted


class SimulatedTiles:
    """Tiles under several conditions, the original first: a tile source whose rows of one place are registered.

    Args:
        source: the tiles as they are.
        conditions: what to simulate.
        seed: of all noise.

    Raises:
        ManifestError: the tiles are simulated ones.
    """

    def __init__(self, source: TileSource, conditions: Sequence[Condition], *, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.source, self.conditions, self.seed = source, list(conditions), seed
        base = source.index.drop(columns=["shard", "offset", "size"], errors="ignore")
        _refuse_simulated(base, "simulate the tiles that they were made from, with all conditions at once")
        frames = [_labelled(base, condition) for condition in (Condition(), *self.conditions)]
        self._index = pd.concat(frames, ignore_index=True)
        self._slides = base["slide_id"].astype(str).to_list()
        self._rows = dict(_rows_by_slide(base))
        self._appearances: dict[str, Appearance] = {}
        self._measuring = threading.Lock()

    @property
    def index(self) -> pd.DataFrame:
        """The source's columns, with `stain` and `scanner` of each row."""
        return self._index

    def __len__(self) -> int:
        return len(self._index)

    def read(self, row: int) -> Rgb:
        """The tile in `row`, simulated."""
        number, place = divmod(row, len(self.source))
        tile = self.source.read(place)
        if number == 0:
            return tile
        return self.conditions[number - 1].apply(tile, self._appearance(self._slides[place]), _seed(self.seed, row))

    def _appearance(self, slide: str) -> Appearance:
        """How a slide is stained, measured when its first tile is asked for, by one of the threads."""
        with self._measuring:
            if slide not in self._appearances:
                shown = _readable(self.source, _spread(self._rows[slide], MEASURED_TILES))
                found = measure_appearance(list(shown))
                restained = any(condition.stain for condition in self.conditions)
                self._appearances[slide] = _told(slide, found) if restained else found
            return self._appearances[slide]


def _rows_by_slide(frame: pd.DataFrame) -> list[tuple[str, IntArray]]:
    return [(str(slide), np.asarray(rows)) for slide, rows in frame.groupby("slide_id").indices.items()]


def _refuse_simulated(index: pd.DataFrame, advice: str) -> None:
    """Their conditions would be measured as one staining."""
    if index.duplicated(["slide_id", "x", "y", "mpp"]).any():
        raise ManifestError(f"The tiles show places several times, as those of `pathokd simulate` do: {advice}.")


def _labelled(base: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    named = {"stain": condition.stain, "scanner": condition.scanner and condition.scanner_name}
    kept: dict[str, Any] = {name: value or ORIGINAL for name, value in named.items()}
    as_found = [name for name, value in named.items() if name in base and value is None]
    kept |= {name: base[name].fillna("").replace("", ORIGINAL) for name in as_found}
    keys = base["key"] if condition == Condition() else base["key"] + f"-{condition.name}"
    case = base["case"] if "case" in base else base["slide_id"]
    return base.assign(key=keys, **kept, case=case)


def _spread(rows: Sequence[int] | IntArray, count: int) -> list[int]:
    """Up to `count` of `rows`, evenly spread."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [int(rows[number]) for number in picked]


def _readable(source: TileSource, rows: Sequence[int]) -> Iterator[Rgb]:
    """Some tiles, but those on a damaged place of their slide: the others tell as much."""
    for row in rows:
        with contextlib.suppress(SlideError):
            yield source.read(row)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def simulate_tiles(
    source: TileSource,
    out_dir: str | Path,
    wanted: Sequence[Condition],
    spec: PackSpec | None = None,
    *,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> PackResult:
    """Write the original tiles and every condition of them into one packed folder.

    Args:
        source: the tiles.
        out_dir: the packed folder; resumable like `pack_tiles`.
        wanted: conditions.
        spec: how tiles are stored, by default as JPEG of quality 95, the original ones too.
        seed: of all noise.
        workers: threads.
        overwrite: write anew.

    Raises:
        ManifestError: the tiles are simulated ones.
        StoreError: `out_dir` holds the tiles themselves or was made with other settings, or the disk is full.
    """
    spec = spec or PackSpec(quality=95)
    if isinstance(source, PackedTiles) and Path(out_dir).resolve() == source.folder.resolve():
        raise StoreError(f"{out_dir} holds the tiles that are to be simulated: name another output folder.")
    settings = {
        **asdict(spec),
        "simulation": SIMULATION,
        "conditions": [
            {**asdict(condition), **({"profile": condition.edited} if condition.edited else {})} for condition in wanted
        ],
        "seed": seed,
        "manifest": source_identity(source.index),
        "source": tile_identity(source),
    }
    simulated = SimulatedTiles(source, wanted, seed=seed)
    slides = slide_marks(source)
    return pack_source(
        simulated, out_dir, spec, settings, slides=slides, verb="simulate", workers=workers, overwrite=overwrite
    )


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
        appearance = measure_appearance(_tissue_tiles(slide, MEASURED_TILES))
        if condition.stain is not None:
            _told(slide.path.name, appearance)
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
        changed = condition.apply(block, appearance, _seed(seed, top * width + left))
        blocks.append(changed[HALO_PX : HALO_PX + bottom - top, HALO_PX : HALO_PX + right - left])
    return np.concatenate(blocks, axis=1)


def _told(slide: str, found: Appearance) -> Appearance:
    """Warn of an appearance that was not measured, or of another staining than H&E."""
    if found.fallback:
        warnings.warn(
            f"{slide} is changed as if it had the reference's staining, for its own cannot be measured: "
            f"{found.fallback}.",
            stacklevel=2,
        )
    elif is_brown(found):
        warnings.warn(
            f"{slide} holds brown where H&E holds eosin, as immunohistochemistry with DAB does: stainings are of "
            "H&E, and turn brown into eosin.",
            stacklevel=2,
        )
    return found


def _tissue_tiles(slide: Slide, count: int, tile_px: int = 256) -> list[Rgb]:
    """The tiles of a slide with most tissue, at 1 um/px or, if it is coarser, at its own resolution."""
    mpp = max(1.0, slide.mpp)
    grid = tile_grid(slide.dimensions, slide.mpp, mpp=mpp, tile_px=tile_px, border="cover")
    overview = slide.overview(mpp=8.0)
    share = tissue_fraction(
        find_tissue(overview, slide.mpp), grid.x, grid.y, mask_downsample=overview.downsample, tile_level0=grid.side
    )
    tiles = []
    for number in np.argsort(-share, kind="stable")[:count]:
        with contextlib.suppress(SlideError):  # a damaged place; the rest of the slide tells as much
            tiles.append(slide.read_tile(int(grid.x[number]), int(grid.y[number]), mpp=mpp, tile_px=tile_px))
    if not tiles:
        raise SlideError(f"{slide.path}: none of its tissue can be read; copy it again from its source.")
    return tiles


def typical_tile(tiles: TileSource | Sequence[SlideSource]) -> Rgb:
    """A tile to show presets on: of some forty, the one whose colours vary most.

    Raises:
        SlideError: no slide or tile can be read; of slides the first one's trouble.
    """
    shown = _shown(tiles) if isinstance(tiles, Sequence) else list(_readable(tiles, _spread(range(len(tiles)), 40)))
    if not shown:
        raise SlideError("Not one of forty tiles can be read: look at their slides with `pathokd inspect`.")
    return max(shown, key=lambda tile: float(to_od(tile).std(axis=(0, 1)).sum()))


def _shown(slides: Sequence[SlideSource]) -> list[Rgb]:
    """Tiles of the first slide that can be read."""
    trouble: SlideError | None = None
    for source in slides:
        try:
            with source.open() as slide:
                return _tissue_tiles(slide, 40)
        except SlideError as error:
            trouble = trouble or error
    raise trouble or SlideError("There is no slide to show presets on.")


def measure_cohort(tiles: TileSource, tiles_per_slide: int = 50) -> StainStatistics:
    """Stain statistics of a cohort, from tiles spread over each slide.

    Raises:
        ValueError: fewer than two slides have tissue, or `tiles_per_slide` is below 1.
        ManifestError: the tiles are simulated ones.
    """
    if tiles_per_slide < 1:
        raise ValueError(f"tiles_per_slide must be at least 1, got {tiles_per_slide}.")
    _refuse_simulated(tiles.index, "measure the tiles that they were made from")
    slides = _rows_by_slide(tiles.index)
    with Bars() as bars:
        return fit_statistics(
            list(_readable(tiles, _spread(rows, tiles_per_slide)))
            for _, rows in bars.track(slides, "measuring slides", len(slides))
        )
