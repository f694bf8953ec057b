"""Does restaining bring the colours of one laboratory to those of another, beside torchstain's Macenko?

H&E of several laboratories, no two of one tissue: each pair of them, both ways. Colour is the sliced Wasserstein
distance of CIELAB distributions (`colour_distance`) of tiles full of tissue. Everything is fitted to the target's even
tiles and compared with its odd ones; "other tiles of the target", the even ones, are the least that could be reached.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathokd.augment import measure_appearance, swap_stain
from pathokd.augment.fit import colour_distance
from pathokd.augment.stain_math import GLASS_OD, Appearance, to_od
from pathokd.pictures import read_image
from pathokd.slides.slide import Slide
from pathokd.types import Rgb

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]

SIDE, TILES, LEAST_TISSUE = 224, 12, 0.5
CONTENDERS = (
    "unchanged", "pathokd swap_stain, of all tiles", "torchstain Macenko, all tiles at once",
    "torchstain Macenko, tile by tile", "other tiles of the target",
)  # fmt: skip
SLIDES = ("wsi_cmu1/CMU-1_section2_20x.tif", "wsi_small/TCGA-CR-7395-01A-01-TS1.svs", "wsi_small/OS-2-ndpi.ome.tif")
PICTURES = (
    "stain_refs/birl_lung-lesion_HE.jpg", "stain_refs/birl_rat-kidney_HE.jpg", "stain_refs/histoqc_template*.png",
    "stain_refs/tiatoolbox_target.png", "wsi_small/instanseg_HE_example.tif", "tiles_nct_crc_9/*.tif",
    *(f"multi_scanner/camelyon17_5centres/centre{number}_*.png" for number in range(5)),
)  # fmt: skip


def full(tile: Rgb) -> bool:
    return bool(np.mean(to_od(tile).mean(axis=2) > GLASS_OD[1]) >= LEAST_TISSUE)


def cut(image: Rgb) -> list[Rgb]:
    height, width = image.shape[:2]
    corners = itertools.product(range(0, height - SIDE + 1, SIDE), range(0, width - SIDE + 1, SIDE))
    return [image[y : y + SIDE, x : x + SIDE] for y, x in corners]


def laboratories(data: Path) -> dict[str, list[Rgb]]:
    """Up to `TILES` tiles of each that has at least four."""
    found: dict[str, list[Rgb]] = {}
    for name in SLIDES:
        with Slide(data / name, mpp_else=0.5) as slide:
            step = SIDE * 0.5 / slide.mpp
            columns, rows = (np.arange(0, side - step, step) for side in slide.dimensions)
            corners = np.random.default_rng(0).permutation(list(itertools.product(columns, rows)))[: 10 * TILES]
            tiles = [slide.read_tile(round(x), round(y), mpp=0.5, tile_px=SIDE) for x, y in corners]
        found[Path(name).name] = tiles
    for pattern in PICTURES:
        found[Path(pattern).name] = [tile for path in sorted(data.glob(pattern)) for tile in cut(read_image(path))]
    fullest = {name: [tile for tile in tiles if full(tile)][:TILES] for name, tiles in found.items()}
    return {name: tiles for name, tiles in fullest.items() if len(tiles) >= 4}


def macenko(source: list[Rgb], target: list[Rgb]) -> list[Rgb]:
    """torchstain, fitted to all tiles of the target at once; it finds the stains of each picture of `source` itself."""
    torchstain = pytest.importorskip("torchstain")
    normalizer = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    normalizer.fit(np.concatenate(target))
    return [np.asarray(normalizer.normalize(picture, stains=False)[0], np.uint8) for picture in source]


def test_restained_tiles_have_the_colours_of_the_target(real_data: Path, publish: Any, markdown: Any) -> None:
    tiles = laboratories(real_data)
    looks = {name: measure_appearance(each) for name, each in tiles.items()}
    distances: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    strengths = []
    for one, other in itertools.permutations(tiles, 2):
        source, target, truth = tiles[one], tiles[other][::2], tiles[other][1::2]
        aim = measure_appearance(target)
        restained = [swap_stain(tile, looks[one], aim) for tile in source]
        contenders = source, restained, macenko([np.concatenate(source)], target), macenko(source, target), target
        for name, changed in zip(distances, contenders, strict=True):
            distances[name].append(colour_distance(changed, truth))
        strengths.append(_strength(aim) / _strength(looks[one]))
    paler = np.array(strengths) < 0.8
    rows = [
        [name, f"{np.mean(each):.2f}", f"{np.mean(np.array(each)[paler]):.2f}", f"{np.median(each):.2f}"]
        for name, each in distances.items()
    ]
    header = ["tiles against the target's", "mean", "mean, much paler target", "median"]
    what = f"{len(tiles)} laboratories, {len(strengths)} pairs, {paler.sum()} of them with a target under .8 as strong"
    publish("restaining", {"distances": distances, "strengths": strengths}, f"{what}\n\n{markdown(header, rows)}")
    unchanged, ours, theirs, *_ = (np.mean(each) for each in distances.values())
    assert ours < 0.7 * unchanged
    assert ours < 1.1 * theirs  # which leaves out what is neither stain, and so comes nearer


def _strength(look: Appearance) -> float:
    """Of both stains, in their geometric mean."""
    return float(np.sqrt(np.prod(look.strength)))
