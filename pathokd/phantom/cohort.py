"""A cohort of phantom slides: every case in every staining and scanner, with class maps and a slide list."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pathokd.errors import StoreError
from pathokd.files import atomic_path, check_header, make_header, write_json, write_text
from pathokd.phantom.layout import ClassMap
from pathokd.phantom.pyramid import check_tile, write_pyramid
from pathokd.phantom.scanner import get_scanner, render
from pathokd.phantom.scene import check_size, make_scene
from pathokd.phantom.stain import get_staining
from pathokd.progress import Bars
from pathokd.types import Microns, Mpp

COLUMNS = ("slide_id", "path", "case", "stain", "scanner", "label_map")
"""Columns of `slides.csv`; paths are relative to it."""
LABEL_MPP = 4.0
"""Microns per pixel of the class maps written beside the slides."""


@dataclass(frozen=True)
class CohortSpec:
    """What a cohort consists of; see `write_cohort` for the fields."""

    cases: int
    stainings: tuple[str, ...]
    scanners: tuple[str, ...]
    size_um: Microns
    margin_um: Microns
    region_um: Microns
    scene_mpp: Mpp
    quality: int | None
    tile_px: int
    seed: int

    def __post_init__(self) -> None:
        if self.cases < 1 or not self.stainings or not self.scanners:
            raise ValueError(
                f"a cohort needs a case, a staining and a scanner, got {self.cases} cases, stainings "
                f"{self.stainings} and scanners {self.scanners}: name at least one of each."
            )
        # All that making a slide would refuse: by then the folder is claimed, and with overwrite the old slides gone.
        check_size(self.size_um, self.margin_um, self.region_um, self.scene_mpp)
        check_tile(self.tile_px)
        if self.seed < 0 or (self.quality is not None and not 1 <= self.quality <= 100):
            raise ValueError(
                f"seed must not be negative and quality must lie in 1..100, got {self.seed} and {self.quality}."
            )
        for names in (self.stainings, self.scanners):
            if len(set(names)) < len(names):
                raise ValueError(f"each staining and scanner may be named once, got {names}: drop the repeated one.")
        for stain in self.stainings:
            get_staining(stain)
        for scanner in self.scanners:
            get_scanner(scanner)

    def rows(self) -> list["SlideRow"]:
        """The slide list."""
        return [
            SlideRow(
                f"{case}_{stain}_{scanner}",
                f"{case}_{stain}_{scanner}.tif",
                case,
                stain,
                scanner,
                f"{case}_classes.png",
            )
            for case in (f"case{number + 1:02d}" for number in range(self.cases))
            for stain in self.stainings
            for scanner in self.scanners
        ]


class SlideRow(NamedTuple):
    """One line of `slides.csv`."""

    slide_id: str
    path: str
    case: str
    stain: str
    scanner: str
    label_map: str


def write_cohort(
    out_dir: str | Path,
    *,
    cases: int = 4,
    stainings: Sequence[str] = ("HE", "violet"),
    scanners: Sequence[str] = ("S50", "S45"),
    size_um: Microns = 1300.0,
    margin_um: Microns = 100.0,
    region_um: Microns = 320.0,
    scene_mpp: Mpp = 0.32,
    quality: int | None = None,
    tile_px: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write slides, class maps and the slide list.

    All slides of a case show the same tissue, registered in microns. A run that was stopped goes on where it
    was: files that are there are kept, if the folder was made with the same settings.

    Args:
        out_dir: folder to write; made if missing.
        cases: number of tissues, each of its own seed.
        stainings: names in `STAININGS`.
        scanners: names in `SCANNERS`.
        size_um: side of the square slide.
        margin_um: mean width of the glass around the tissue.
        region_um: side of a tissue region, about.
        scene_mpp: microns per pixel of the dye maps.
        quality: JPEG quality of all slides; None takes each scanner's own.
        tile_px: side of the tiles in the TIFF.
        seed: of the whole cohort.
        overwrite: write everything anew, also over other settings.

    Returns:
        Path of `slides.csv`.

    Raises:
        ValueError: an unknown staining or scanner, or fewer than one case.
        StoreError: the folder holds a cohort made with other settings, or cannot be written to.
    """
    spec = CohortSpec(
        cases,
        tuple(stainings),
        tuple(scanners),
        size_um,
        margin_um,
        region_um,
        scene_mpp,
        quality,
        tile_px,
        seed,
    )
    out = Path(out_dir)
    _claim(out / "cohort.json", spec, overwrite)
    rows = spec.rows()
    with Bars() as bars:
        list(bars.track(_write_slides(out, spec), "phantom slides", len(rows)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(out / "slides.csv", text.getvalue())
    return out / "slides.csv"


def _claim(path: Path, spec: CohortSpec, overwrite: bool) -> None:
    """Mark the folder with the settings, or check the mark that is there."""
    header = make_header("phantom-cohort/1", json.loads(json.dumps(asdict(spec))))
    if path.exists() and not overwrite:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}): pass --overwrite to redo the cohort.") from error
        check_header(found, header, path)
    if overwrite:  # away with the old first, so that a run stopped half-way resumes without mixing the two
        for row in spec.rows():
            for name in (row.path, row.label_map, "slides.csv"):
                (path.parent / name).unlink(missing_ok=True)
    write_json(path, header)


def _write_slides(out: Path, spec: CohortSpec) -> Iterator[SlideRow]:
    """Write what is missing, growing each case's tissue once and only if a file of it is missing."""
    rows = spec.rows()
    each = len(rows) // spec.cases
    for number in range(spec.cases):
        mine = rows[number * each : (number + 1) * each]
        missing = [row for row in mine if not (out / row.path).exists()]
        done = [row for row in mine if row not in missing]
        yield from done
        label_map = out / mine[0].label_map
        sidecar = label_map.with_suffix(".json")
        if not missing and label_map.exists() and sidecar.exists():
            continue
        scene = make_scene(
            case_seed(spec.seed, number),
            spec.size_um,
            margin_um=spec.margin_um,
            region_um=spec.region_um,
            mpp=spec.scene_mpp,
        )
        _write_png(label_map, scene.label_map(LABEL_MPP))
        write_json(sidecar, {"mpp": LABEL_MPP, "classes": list(scene.classes)})
        for row in missing:
            scanner = get_scanner(row.scanner)
            quality = scanner.jpeg_quality if spec.quality is None else spec.quality
            image = render(scene, row.stain, scanner)
            write_pyramid(out / row.path, image, scanner.mpp, quality=quality, tile_px=spec.tile_px)
            yield row


def case_seed(seed: int, number: int) -> int:
    """Seed of the tissue of case `number` (from 0) in a cohort."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _write_png(path: Path, image: ClassMap) -> None:
    with atomic_path(path) as part, open(part, "wb") as file:
        Image.fromarray(image).save(file, "PNG", optimize=True)
