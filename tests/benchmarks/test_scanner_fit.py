"""Does a fitted profile bring one real scanner nearer to another, on regions it was not fitted on?

OS-2: the same 500 um field on a Hamamatsu and an Olympus, cut into places of 64 um; every other place is left out of
the fit. CAMELYON17: five tiles of each of five centres, unregistered; fitted on two quarters of each, tested on the
other two. Distances before and after, on what was left out. CIELAB units and log10 of power.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathokd.augment.fit import colour_distance, fit_scanner_profile, spectrum_distance
from pathokd.augment.images import read_image
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


def centres(data: Path) -> dict[str, tuple[list[Rgb], list[Rgb]]]:
    """Quarters of each centre's tiles, 256 px: two of each tile to fit on, and the two across from them to test on."""
    found: dict[str, tuple[list[Rgb], list[Rgb]]] = {}
    for path in sorted((data / "multi_scanner/camelyon17_5centres").glob("*.png")):
        image = read_image(path)
        fit, test = found.setdefault(path.name.split("_")[0], ([], []))
        for y, x in itertools.product((0, 256), (0, 256)):
            (fit if x == y else test).append(image[y : y + 256, x : x + 256])
    return found


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
    found: dict[str, list[float]] = {}
    for one, other in itertools.permutations(places, 2):
        fit, test = slice(0, None, 2), slice(1, None, 2)
        found[f"OS-2, {one} to {other}"] = measured(
            places[one][fit], places[other][fit], places[one][test], places[other][test], registered=True
        )
    for one, other in itertools.permutations(tiles, 2):
        found[f"CAMELYON17, {one} to {other}"] = measured(
            tiles[one][0], tiles[other][0], tiles[one][1], tiles[other][1], registered=False
        )
    header = ["from, to", "colour before", "after", "factor", "spectrum before", "after", "factor"]
    rows = [
        [name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}", f"{c:.2f}", f"{d:.2f}", f"{d / c:.2f}"]
        for name, (a, b, c, d) in found.items()
    ]
    publish("scanner_fit", {"distances": found}, f"Scanner profiles on regions left out\n\n{markdown(header, rows)}")
    factors = {name: (b / a, d / c) for name, (a, b, c, d) in found.items()}
    pairs = [factor for name, factor in factors.items() if name.startswith("OS-2")]
    others = np.array([factor for name, factor in factors.items() if name.startswith("CAMELYON17")])
    assert all(colour < 0.6 for colour, _ in pairs)
    assert all(others[:, 0] < 0.9)
    assert np.median(others[:, 0]) < 0.5
    assert np.median(np.concatenate([others[:, 1], [spectrum for _, spectrum in pairs]])) < 0.7
