"""Views of a tile: one shared geometry, then each view's own photometric transforms.

Patch tokens of teacher and student can only be compared where both saw the same geometry, so crop and orientation are
drawn once per draw; what differs between views is stain, light, focus and compression. Every random number comes from
(seed, epoch, tile), never from a worker: albumentations 2.0.8 replays one stream in every worker and epoch otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import albumentations as A
import cv2
import numpy as np

from pathokd.data.batch import Draw
from pathokd.types import Rgb

CLEAN = "clean"
"""The view without photometric change; the teacher's by default."""


@dataclass(frozen=True)
class Geometry:
    """How a view is cut from a tile; the same for all views of a draw.

    Args:
        size_px: side of a view in pixels.
        scale: range of the crop's share of the tile's area; (1, 1) takes the whole tile.
        d4: draw one of the eight flips and quarter turns (tissue has no canonical orientation).
    """

    size_px: int = 224
    scale: tuple[float, float] = (1.0, 1.0)
    d4: bool = True

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {self.scale}.")
        if self.size_px < 1:
            raise ValueError(f"size_px must be positive, got {self.size_px}.")


def crop_box(tile_px: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int]:
    """Left, top and side of a random square crop whose share of the area is uniform in `scale`."""
    share = rng.uniform(*scale)
    side = min(tile_px, max(1, round(tile_px * share**0.5)))
    left, top = rng.integers(0, tile_px - side, size=2, endpoint=True)
    return int(left), int(top), side


def d4(image: Rgb, element: int) -> Rgb:
    """One of the eight symmetries of the square: `element % 4` quarter turns, mirrored first if `element >= 4`."""
    turned = np.rot90(image[:, ::-1] if element >= 4 else image, element % 4)
    return np.ascontiguousarray(turned)


def resize(image: Rgb, size_px: int) -> Rgb:
    """Square resize: area averaging when shrinking, cubic when enlarging, the identity at equal size."""
    if image.shape[0] == size_px and image.shape[1] == size_px:
        return image
    method = cv2.INTER_AREA if image.shape[0] > size_px else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (size_px, size_px), interpolation=method), np.uint8)


class Views:
    """Draws the named views of a tile.

    Args:
        geometry: the shared crop and orientation.
        photometric: view name to albumentations transforms applied to that view alone. The view `clean` always exists.
        seed: together with epoch and tile decides every draw.
    """

    def __init__(
        self, geometry: Geometry, photometric: Mapping[str, Sequence[A.BasicTransform]] | None = None, *, seed: int = 0
    ) -> None:
        named = {CLEAN: [], **{name: list(steps) for name, steps in (photometric or {}).items()}}
        if named[CLEAN]:
            raise ValueError("The view 'clean' takes no photometric transforms: give the perturbed view another name.")
        self.geometry, self.seed = geometry, seed
        self._photometric = {name: A.Compose(steps, strict=True) if steps else None for name, steps in named.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the views, `clean` first."""
        return tuple(self._photometric)

    def __call__(self, tile: Rgb, draw: Draw) -> dict[str, Rgb]:
        """All views of `tile`, each uint8 (size_px, size_px, 3)."""
        rng = np.random.default_rng([self.seed, draw.epoch, draw.position])
        base = self._cut(tile, rng)
        views = {}
        for name, transform in self._photometric.items():
            if transform is None:
                views[name] = base
            else:
                transform.set_random_seed(int(rng.integers(2**31)))
                views[name] = transform(image=base)["image"]
        return views

    def _cut(self, tile: Rgb, rng: np.random.Generator) -> Rgb:
        left, top, side = crop_box(min(tile.shape[:2]), self.geometry.scale, rng)
        cut = resize(tile[top : top + side, left : left + side], self.geometry.size_px)
        return d4(cut, int(rng.integers(8))) if self.geometry.d4 else cut
