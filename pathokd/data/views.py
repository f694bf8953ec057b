"""Views of a tile: crops, and each view's own photometric transforms on one of them.

Patch tokens of teacher and student can only be compared where both saw the same geometry, so crop and orientation are
drawn once per draw; what differs between views of one crop is stain, light, focus and compression. Further crops (a
second global one, small local ones) serve objectives on the class token. Every random number comes from (seed, epoch,
tile), never from a worker: albumentations 2.0.8 replays one stream in every worker and epoch otherwise.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import albumentations as A
import cv2
import numpy as np

from pathokd.data.batch import Draw
from pathokd.types import Rgb

CLEAN = "clean"
"""The view without photometric change; the teacher's by default. Also the name of the crop it is a view of."""
_TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


@dataclass(frozen=True)
class Geometry:
    """How a crop is cut from a tile; the same for all views of it.

    Args:
        size_px: side of a view in pixels.
        scale: range of the crop's share of the tile's area; (1, 1) takes the whole tile.
        d4: draw one of the eight flips and quarter turns (tissue has no canonical orientation).
        count: how many such crops of one tile make a view; each is drawn anew.
    """

    size_px: int = 224
    scale: tuple[float, float] = (1.0, 1.0)
    d4: bool = True
    count: int = 1

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {self.scale}.")
        if self.size_px < 1 or self.count < 1:
            raise ValueError(f"size_px and count must be positive, got {self.size_px} and {self.count}.")


def crop_box(tile_px: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int]:
    """Left, top and side of a random square crop whose share of the area is uniform in `scale`."""
    share = rng.uniform(*scale)
    side = min(tile_px, max(1, round(tile_px * share**0.5)))
    left, top = rng.integers(0, tile_px - side, size=2, endpoint=True)
    return int(left), int(top), side


def d4(image: Rgb, element: int) -> Rgb:
    """One of the eight symmetries of the square: `element % 4` quarter turns, mirrored first if `element >= 4`."""
    mirrored = cv2.flip(image, 1) if element >= 4 else image
    turn = _TURNS[element % 4]
    return np.asarray(mirrored if turn is None else cv2.rotate(mirrored, turn), np.uint8)


def resize(image: Rgb, size_px: int) -> Rgb:
    """Square resize: area averaging when shrinking, cubic when enlarging, the identity at equal size."""
    if image.shape[0] == size_px and image.shape[1] == size_px:
        return image
    method = cv2.INTER_AREA if image.shape[0] > size_px else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (size_px, size_px), interpolation=method), np.uint8)


def orientation(key: str) -> int:
    """Which of the eight symmetries a tile keeps for ever, drawn from its key: the same on every machine."""
    return hashlib.sha256(key.encode()).digest()[0] % 8


def whole_tile(tile: Rgb, size_px: int, element: int) -> Rgb:
    """The whole tile at `size_px`, in one of eight orientations: the view that targets are computed on beforehand."""
    side = min(tile.shape[:2])
    return d4(resize(tile[:side, :side], size_px), element)


def crop_of(view: str, crops: Collection[str]) -> str:
    """The crop that a view shows: the part of its name before a slash, or itself, or else the shared crop `clean`."""
    crop = view.partition("/")[0]
    return crop if crop in crops else CLEAN


def dino_crops(local_crops: int = 8) -> dict[str, Geometry]:
    """DINOv2's multi-crop beside the shared crop: a second global crop, and local ones of seven patches of 14 px.

    The shared crop is the first global one; give it the scale (0.32, 1). The transforms are those of
    `pathokd.augment.dino_views`.

    Reference:
        Oquab et al. 2023, "DINOv2" (arXiv 2304.07193), Table 16; sizes of the released configurations (method.md A.4).
    """
    return {"global2": Geometry(224, (0.32, 1.0)), "local": Geometry(98, (0.05, 0.32), count=local_crops)}


class Views:
    """Draws the named views of a tile.

    Args:
        geometry: the crop that views share; its clean view is called `clean`.
        photometric: view name to albumentations transforms applied to that view alone. A name `CROP/NAME` is a view of
            one of `crops`; any other is one of the shared crop.
        crops: further crops, cut from the same tile on their own; each has a clean view under its own name.
        seed: together with epoch and tile decides every draw.
    """

    def __init__(
        self,
        geometry: Geometry,
        photometric: Mapping[str, Sequence[A.BasicTransform]] | None = None,
        crops: Mapping[str, Geometry] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if geometry.count != 1:
            raise ValueError(
                f"The shared crop is drawn once, got count: {geometry.count}: add an entry to crops instead."
            )
        self.geometry, self.seed = geometry, seed
        self.crops = {CLEAN: geometry, **(crops or {})}
        named = {**dict.fromkeys(self.crops, ()), **(photometric or {})}
        for name, steps in named.items():
            if name in self.crops and steps:
                raise ValueError(
                    f"The view {name!r} takes no photometric transforms: give the perturbed view another name."
                )
            if "/" in name and crop_of(name, self.crops) == CLEAN:
                known = ", ".join(crops or {}) or "none"
                raise ValueError(f"The view {name!r} is of a crop that data.crops does not name; it names {known}.")
        self._photometric = {name: A.Compose(list(t), strict=True) if t else None for name, t in named.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the views, `clean` first."""
        return tuple(self._photometric)

    def __call__(self, tile: Rgb, draw: Draw, element: int | None = None) -> dict[str, Rgb]:
        """All views of `tile`, each uint8 (size_px, size_px, 3), or (count, size_px, size_px, 3) of a repeated crop.

        `element` fixes the geometry of the shared crop, as targets that were computed beforehand ask for: the whole
        tile in this orientation. Without it the geometry is drawn.
        """
        rng = np.random.default_rng([self.seed, draw.epoch, draw.position])
        fixed = {} if element is None else {CLEAN: [whole_tile(tile, self.geometry.size_px, element)]}
        cut = {
            name: fixed[name] if name in fixed else [_cut(tile, crop, rng) for _ in range(crop.count)]
            for name, crop in self.crops.items()
        }
        views = {}
        for name, transform in self._photometric.items():
            crop = crop_of(name, self.crops)
            images = cut[crop]
            if transform is not None:
                images = [_changed(transform, image, rng) for image in images]
            views[name] = images[0] if self.crops[crop].count == 1 else np.stack(images)
        return views


def _changed(transform: A.Compose, image: Rgb, rng: np.random.Generator) -> Rgb:
    transform.set_random_seed(int(rng.integers(2**31)))
    changed: Rgb = transform(image=image)["image"]
    return changed


def _cut(tile: Rgb, crop: Geometry, rng: np.random.Generator) -> Rgb:
    left, top, side = crop_box(min(tile.shape[:2]), crop.scale, rng)
    cut = resize(tile[top : top + side, left : left + side], crop.size_px)
    return d4(cut, int(rng.integers(8))) if crop.d4 else cut
