"""How much nearer a fitted scanner profile brings one scanner's tiles to another's, on regions left out of the fit.

OS-2: the same field of a Ki67 section on a Hamamatsu and an Olympus; fitted on the left half, tested on the right, and the
other way round. CAMELYON17: five crops from each of five centres, other tissue in each; fitted on three, tested on two, in
five splits. `floor` is the same distance between crops of one centre, which no profile can be expected to beat: what is
left there is other tissue.
"""

from itertools import permutations
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from pathokd.augment.fit import colour_distance, fit_scanner_profile, spectrum_distance
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

MPP, TILE_PX = 0.5, 200
"""The field of 500 um makes five by five tiles of 100 um; the middle column is left out, as it touches both halves."""
HEADER = ["from, to", "colour before", "after", "factor", "spectrum before", "after", "factor", "colour floor"]


class Change(NamedTuple):
    """Distances to the target's left-out tiles, before and after."""

    colour: tuple[float, float]
    spectrum: tuple[float, float]

    @property
    def factors(self) -> tuple[float, float]:
        """How many times nearer, in colour and in spectrum."""
        return self.colour[0] / self.colour[1], self.spectrum[0] / self.spectrum[1]


def measure(
    fit: tuple[list[Rgb], list[Rgb]], test: tuple[list[Rgb], list[Rgb]], *, registered: bool, paired: bool
) -> Change:
    """Fit on one set of tiles, judge on the other; `paired` says whether the test tiles show the same tissue."""
    profile = fit_scanner_profile(*fit, registered=registered)
    source, target = test
    mapped = [profile.apply(tile, seed=number) for number, tile in enumerate(source)]
    colour = [colour_distance(tiles, target, registered=paired) for tiles in (source, mapped)]
    spectrum = [spectrum_distance(tiles, target) for tiles in (source, mapped)]
    return Change((colour[0], colour[1]), (spectrum[0], spectrum[1]))


def average(changes: list[Change]) -> Change:
    colour, spectrum = (np.mean([getattr(c, name) for c in changes], axis=0) for name in ("colour", "spectrum"))
    return Change((float(colour[0]), float(colour[1])), (float(spectrum[0]), float(spectrum[1])))


def row(name: str, change: Change, floor: float | None = None) -> list[str]:
    (c0, c1), (s0, s1) = change.colour, change.spectrum
    factors = [f"{factor:.2f}" for factor in change.factors]
    shown = "" if floor is None else f"{floor:.2f}"
    return [name, f"{c0:.2f}", f"{c1:.2f}", factors[0], f"{s0:.3f}", f"{s1:.3f}", factors[1], shown]


def halves(path: Path) -> list[list[Rgb]]:
    """Tiles of the left and of the right two fifths of the field."""
    with Slide(path) as slide:
        side = round(TILE_PX * MPP / slide.mpp)
        grid = [[(x * side, y * side) for x in columns for y in range(5)] for columns in ((0, 1), (3, 4))]
        return [[slide.read_tile(*at, mpp=MPP, tile_px=TILE_PX) for at in part] for part in grid]


def test_os2(real_data: Path, publish: Any, markdown: Any) -> None:
    small = real_data / "wsi_small"
    scans = {"Hamamatsu": halves(small / "OS-2-ndpi.ome.tif"), "Olympus": halves(small / "OS-2-vsi.ome.tif")}
    rows, found = [], {}
    for one, other in permutations(scans, 2):
        for registered in (True, False):
            changes = [
                measure(
                    (scans[one][half], scans[other][half]),
                    (scans[one][1 - half], scans[other][1 - half]),
                    registered=registered,
                    paired=True,
                )
                for half in (0, 1)
            ]
            name = f"{one}, {other}, {'registered' if registered else 'unregistered'}"
            found[name] = average(changes)
            rows.append(row(name, found[name]))
    title = "OS-2, left-out half: mean CIE76 of blurred pixels, rms log10 power spectrum"
    publish("scanner_fit_os2", {name: c._asdict() for name, c in found.items()}, f"{title}\n\n{markdown(HEADER, rows)}")
    assert min(c.factors[0] for name, c in found.items() if name.endswith(" registered")) >= COLOUR_OS2
    assert min(c.factors[1] for name, c in found.items() if name.endswith(" registered")) >= SPECTRUM_OS2


COLOUR_OS2, SPECTRUM_OS2 = 2.0, 1.0
COLOUR_CENTRES, SPECTRUM_CENTRES = 1.4, 1.0
"""Asserted: the least factor on OS-2, the geometric mean over ordered pairs of centres."""


def centres(folder: Path) -> list[list[Rgb]]:
    files = [sorted(folder.glob(f"centre{number}_*.png")) for number in range(5)]
    return [[np.ascontiguousarray(cv2.imread(str(file))[..., ::-1]) for file in group] for group in files]


def split(tiles: list[Rgb], number: int) -> tuple[list[Rgb], list[Rgb]]:
    """Three to fit on and two to test on; five splits in which each tile is left out twice."""
    out = {number % 5, (number + 1) % 5}
    return [t for i, t in enumerate(tiles) if i not in out], [t for i, t in enumerate(tiles) if i in out]


def test_camelyon17(real_data: Path, publish: Any, markdown: Any) -> None:
    crops = centres(real_data / "multi_scanner/camelyon17_5centres")
    assert [len(group) for group in crops] == [5] * 5
    floors = [mean(colour_distance(*split(group, number)) for number in range(5)) for group in crops]
    found = {}
    for one, other in permutations(range(5), 2):
        changes = []
        for number in range(5):
            # Other splits of the two sides, so that no accident of numbering pairs like with like.
            (fit_a, test_a), (fit_b, test_b) = split(crops[one], number), split(crops[other], 2 * number)
            changes.append(measure((fit_a, fit_b), (test_a, test_b), registered=False, paired=False))
        found[one, other] = average(changes)
    rows = [row(f"centre {one}, {other}", change, floors[other]) for (one, other), change in found.items()]
    rows.append(row("mean", average(list(found.values())), mean(floors)))
    title = "CAMELYON17, left-out crops: sliced Wasserstein distance in CIELAB, rms log10 power spectrum"
    publish(
        "scanner_fit_camelyon17",
        {f"{one} to {other}": change._asdict() for (one, other), change in found.items()},
        f"{title}\n\n{markdown(HEADER, rows)}",
    )
    assert geometric_mean(c.factors[0] for c in found.values()) >= COLOUR_CENTRES
    assert geometric_mean(c.factors[1] for c in found.values()) >= SPECTRUM_CENTRES
