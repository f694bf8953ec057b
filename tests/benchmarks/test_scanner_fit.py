"""Does a fitted profile bring one real scanner nearer to another, on regions it was not fitted on?

OS-2: the same 500 um field on a Hamamatsu and an Olympus, cut into places of 64 um; fitted on the left three columns,
tested on the right three, the middle one left out. CAMELYON17: five tiles of each of five centres, unregistered, whole
tiles left out: fitted on three, tested on two, and the other way round; the mean of both splits is shown. What is left
out then holds other tissue than what was fitted on, which counts as distance too. CIELAB units and log10 of power.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathokd.augment.fit import colour_distance, fit_scanner_profile, spectrum_distance
from pathokd.pictures import read_image
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

MPP, SIDE = 0.4, 160


def os2_places(data: Path) -> dict[str, list[Rgb]]:
    """The field on both scanners, place by place."""
    places = {}
    for name, file in (("Hamamatsu", "OS-2-ndpi.ome.tif"), ("Olympus", "OS-2-vsi.ome.tif")):
        with Slide(data / "wsi_small" / file) as slide:
            step = SIDE * MPP / slide.mpp
            corners = [(round(column * step), round(row * step)) for row in range(7) for column in range(7)]
            places[name] = [slide.read_tile(*corner, mpp=MPP, tile_px=SIDE) for corner in corners]
    return places


def centres(data: Path) -> dict[str, list[list[Rgb]]]:
    """Each centre's tiles, each as four quarters of 256 px."""
    found: dict[str, list[list[Rgb]]] = {}
    for path in sorted((data / "multi_scanner/camelyon17_5centres").glob("*.png")):
        image = read_image(path)
        quarters = [image[y : y + 256, x : x + 256] for y, x in itertools.product((0, 256), (0, 256))]
        found.setdefault(path.name.split("_")[0], []).append(quarters)
    return found


def flat(tiles: list[list[Rgb]]) -> list[Rgb]:
    return list(itertools.chain.from_iterable(tiles))


def measured(source: list[Rgb], target: list[Rgb], test: list[Rgb], truth: list[Rgb], registered: bool) -> list[float]:
    """Colour before and after, spectrum before and after."""
    profile = fit_scanner_profile(source, target, registered=registered)
    mapped = [profile.apply(tile, seed=number) for number, tile in enumerate(test)]
    return [
        colour_distance(test, truth, registered=registered),
        colour_distance(mapped, truth, registered=registered),
        spectrum_distance(test, truth),
        spectrum_distance(mapped, truth),
    ]


def test_profiles_bring_scanners_nearer(real_data: Path, publish: Any, markdown: Any) -> None:
    places, tiles = os2_places(real_data), centres(real_data)
    left = [number for number in range(49) if number % 7 < 3]
    right = [number for number in range(49) if number % 7 > 3]
    found: dict[str, list[float]] = {}
    for one, other in itertools.permutations(places, 2):
        parts = [[places[name][i] for i in side] for side in (left, right) for name in (one, other)]
        found[f"OS-2, {one} to {other}"] = measured(*parts, registered=True)
    for one, other in itertools.permutations(tiles, 2):
        a, b = tiles[one], tiles[other]
        splits = [
            measured(flat(a[:3]), flat(b[:3]), flat(a[3:]), flat(b[3:]), registered=False),
            measured(flat(a[2:]), flat(b[2:]), flat(a[:2]), flat(b[:2]), registered=False),
        ]
        found[f"CAMELYON17, {one} to {other}"] = [float(value) for value in np.mean(splits, axis=0)]
    whole = np.array([values for name, values in found.items() if name.startswith("CAMELYON17")])
    found["CAMELYON17, mean of 20 pairs"] = [float(value) for value in whole.mean(axis=0)]
    header = ["from, to", "colour before", "after", "factor", "spectrum before", "after", "factor"]
    rows = [
        [name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}", f"{c:.2f}", f"{d:.2f}", f"{d / c:.2f}"]
        for name, (a, b, c, d) in found.items()
    ]
    publish("scanner_fit", {"distances": found}, f"Scanner profiles on regions left out\n\n{markdown(header, rows)}")
    pairs = np.array([values for name, values in found.items() if name.startswith("OS-2")])
    assert (pairs[:, 1] < 0.6 * pairs[:, 0]).all()
    assert (pairs[:, 3] < 0.8 * pairs[:, 2]).all()
    assert whole[:, 1].mean() < 0.75 * whole[:, 0].mean()
    assert whole[:, 3].mean() < 1.1 * whole[:, 2].mean()
