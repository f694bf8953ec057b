"""What students of real tiles are measured by, tile by tile, so that a difference between two models is paired.

Registered tiles are simulated from slides that nobody trained on: as they are, under two scanner profiles, and in two
stainings of CAMELYON17 and NCT-CRC, which no view, pair or training slide of pathokd has.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import StratifiedKFold

from pathokd.augment import PROFILES, measure_appearance, swap_stain
from pathokd.data.batch import TileSource
from pathokd.embed import Embedder
from pathokd.evaluate.bootstrap import percentiles
from pathokd.evaluate.images import FOLDS, resize
from pathokd.evaluate.probes import predict_linear, predict_nearest
from pathokd.evaluate.resampling import Resampler, ratio
from pathokd.metrics import compare_conditions, unit_rows
from pathokd.models import Encoder, load_encoder
from pathokd.pictures import read_image

ORIGINAL = "original"
SCANNERS = ("soft-warm", "sharp-blue")
STAININGS = ("camelyon17-4", "nct-crc")
REFERENCES = ("multi_scanner/camelyon17_5centres/centre4_*.png", "tiles_nct_crc_9/*.tif")
"""Pictures that show each staining."""
PAIRS = {"scanner": [SCANNERS], "staining": [(ORIGINAL, name) for name in STAININGS]}
"""What is found again where. Either scanner against the original is too easy: the ViT-S finds .98 of all tiles."""
VIT_S = "weights/vit_small_patch14_dinov2_imgfocus_first8blocks_fp16.safetensors"
Values = npt.NDArray[np.float64]
COLUMNS = {
    "PathMNIST probe": "probe",
    "10-NN": "nearest10",
    "nearest of the same centre": "centre",
    "top-10 across scanners": "scanner top10",
    "separation": "scanner separation",
    "top-10 across stainings": "staining top10",
    "separation ": "staining separation",
}
"""Of a table: heading to the name of a measure."""


class Registered(NamedTuple):
    """Tiles under several conditions; row i is one place in all of them."""

    images: dict[str, npt.NDArray[np.uint8]]
    """Condition (`original`, or a name of `SCANNERS` or `STAININGS`) to (n, height, width, 3)."""
    places: npt.NDArray[np.str_]
    """(n,) what is resampled as a whole: a tile, or the picture that crops were cut from."""


class Measured(NamedTuple):
    """One measure of one model, unit by unit."""

    values: Values
    """(n,) whose mean, or mean of the means of classes, is the measure."""
    groups: npt.NDArray[np.str_]
    """(n,) what is resampled as a whole."""
    classes: npt.NDArray[np.int64]
    """(n,) each class weighs the same; all 0 for a plain mean."""


def load_teacher(data: Path) -> Encoder:
    """The saliency-tuned ViT-S/14 after block 6, as configs/distill/real_vits_views.yaml describes it."""
    return load_encoder(
        str(data / VIT_S),
        architecture="vit_small_patch14_dinov2",
        model_args={"depth": 6, "dynamic_img_size": True},
        image_px=224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def crops(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CAMELYON17's 512 px tiles cut in four: images (n, 256, 256, 3), centre and tile of each."""
    images, centres, tiles = [], [], []
    for number, path in enumerate(sorted((data / "multi_scanner/camelyon17_5centres").glob("*.png"))):
        image = read_image(path)
        for y, x in itertools.product((0, 256), (0, 256)):
            images.append(image[y : y + 256, x : x + 256])
            centres.append(path.name.split("_")[0])
            tiles.append(number)
    return np.stack(images), np.array(centres), np.array(tiles)


def shown(images: np.ndarray) -> np.ndarray:
    """224 px from the middle of 256."""
    return np.ascontiguousarray(images[:, 16:240, 16:240])


def registered_tiles(tiles: TileSource, data: Path) -> Registered:
    """Tiles of 224 px, then CAMELYON17's crops; each slide and each picture is restained as a whole."""
    pictures, _, numbers = crops(data)
    originals = np.concatenate([np.stack([tiles.read(row) for row in range(len(tiles))]), shown(pictures)])
    crop_names = np.char.add("camelyon-", numbers.astype(str))
    slides = np.concatenate([tiles.index["slide_id"].to_numpy(str), crop_names])
    own = {slide: measure_appearance(list(originals[slides == slide])) for slide in np.unique(slides)}
    found = {ORIGINAL: originals}
    for name in SCANNERS:
        seen = [PROFILES[name].apply(tile, seed=row) for row, tile in enumerate(originals)]
        found[name] = np.stack(seen)
    for name, pattern in zip(STAININGS, REFERENCES, strict=True):
        target = measure_appearance([read_image(path) for path in sorted(data.glob(pattern))])
        stained = [swap_stain(tile, own[slide], target) for tile, slide in zip(originals, slides, strict=True)]
        found[name] = np.stack(stained)
    places = np.concatenate([tiles.index["key"].to_numpy(str), crop_names])
    return Registered(found, places)


def measure(embedder: Embedder, registered: Registered, data: Path) -> dict[str, Measured]:
    """All measures of one model.

    Args:
        embedder: The model.
        registered: Of `registered_tiles`, whose last rows are the crops of CAMELYON17.
        data: The folder of real data.
    """
    x = {name: embedder(images) for name, images in registered.images.items()}
    whole = np.zeros(len(registered.places), np.int64)
    found: dict[str, Measured] = {}
    for kind, pairs in PAIRS.items():
        compared = compare_conditions(list(x), lambda name: x[name], (10,), pairs=pairs, tiles=True)
        scores = [pair.tiles for pair in compared]
        hits = np.mean([(t.first_to_second[:, 0] + t.second_to_first[:, 0]).numpy() / 2 for t in scores], axis=0)
        apart = np.mean([t.separation.numpy() for t in scores], axis=0)
        found[f"{kind} top10"] = Measured(hits, registered.places, whole)
        found[f"{kind} separation"] = Measured(apart, registered.places, whole)
    _, centres, tiles = crops(data)
    near = same_centre(x[ORIGINAL][-len(centres) :], centres, tiles)
    found["centre"] = Measured(near, tiles.astype(str), np.zeros(len(near), np.int64))
    return found | probe(embedder, data / "tiles_pathmnist1k/pathmnist_train1000.npz")


def same_centre(features: np.ndarray, centres: np.ndarray, tiles: np.ndarray) -> Values:
    """(n,) whether a crop's nearest neighbour from another tile is of the same centre; chance is 4/24."""
    x = unit_rows(torch.from_numpy(features)).numpy()
    similarity = x @ x.T
    similarity[tiles[:, None] == tiles[None]] = -np.inf
    return (centres[similarity.argmax(axis=1)] == centres).astype(np.float64)


def probe(embedder: Embedder, path: Path) -> dict[str, Measured]:
    """Whether each image is classified rightly by a probe and by 10-NN that did not see its fold, as `probe_images`."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].reshape(-1).astype(np.int64)
    x = embedder(resize(images, embedder.encoder.card.image_px))
    right = {"probe": np.empty(len(labels)), "nearest10": np.empty(len(labels))}
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(x, labels):
        known = x[train], labels[train], x[test]
        right["probe"][test] = predict_linear(*known) == labels[test]
        right["nearest10"][test] = predict_nearest(*known) == labels[test]
    units = np.arange(len(labels)).astype(str)
    return {name: Measured(values, units, labels) for name, values in right.items()}


def value(measured: Measured) -> float:
    """Mean over units, or mean over classes of their means."""
    return float(np.mean([measured.values[measured.classes == each].mean() for each in np.unique(measured.classes)]))


def difference(students: list[Measured], reference: list[Measured]) -> tuple[float, float, float]:
    """Mean over seeds minus that of the reference, and its 95 % interval under resampling of groups, both alike.

    The interval says what other tiles might have given, not what other seeds might.
    """
    gain = np.mean([each.values for each in students], axis=0) - np.mean([each.values for each in reference], axis=0)
    first = students[0]
    member = (first.classes[:, None] == np.unique(first.classes)[None]).astype(np.float64)
    resampler = Resampler(first.groups)
    drawn = np.nanmean(ratio(resampler.sums(member * gain[:, None]), resampler.sums(member)), axis=1)
    return value(first._replace(values=gain)), *percentiles(drawn, resampler.n_groups)


def save(path: Path, measures: dict[str, Measured]) -> None:
    """Keep all measures of one model in an .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}/{field}": part for name, each in measures.items() for field, part in each._asdict().items()}
    np.savez(path, **arrays)


def load(path: Path) -> dict[str, Measured]:
    """What `save` kept."""
    with np.load(path, allow_pickle=False) as file:
        names = {key.partition("/")[0] for key in file.files}
        return {name: Measured(*(file[f"{name}/{field}"] for field in Measured._fields)) for name in names}
