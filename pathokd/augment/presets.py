"""Ready-made views: what a student should see of a tile so that stain and scanner stop mattering to it.

The teacher looks at the clean view. The student looks at the same geometry, stained and scanned another way. One
number, `strength`, scales everything; at 0 the view is the clean one.
"""

from typing import Any

import albumentations as A
import numpy as np

from pathokd.augment.factors import ScannerJitter
from pathokd.augment.stain import StainJitter, StainSwap
from pathokd.types import Rgb

SWAP_PROBABILITY = 0.4
"""Share of views that get another laboratory's dyes on top of other amounts of their own."""


class StudentView(A.ImageOnlyTransform):
    """Another staining, another scanner and another rendering of colours, drawn anew for every view.

    Amounts of haematoxylin and eosin vary, sometimes the dyes themselves, then a scanner's light, optics, sensor,
    processing and compression. All of that moves colours as far as real laboratories and scanners do. Brightness,
    contrast, saturation and hue of the whole picture, glass included, then go further: a student that was only shown
    what is plausible finds fewer places across scanners than one that was shown more (tests/benchmarks/RESULTS.md).

    Harm (RESULTS.md): a probe trained on such views finds the tissue class of phantoms up to strength 1, of enlarged
    PathMNIST thumbnails up to 0.75, within 0.02 of its accuracy on clean tiles. A model that never saw such views bears
    far less.

    Args:
        strength: 0 changes nothing; 1 turns hue by up to 29 degrees and saturation by 40 %.
        p: probability.
    """

    def __init__(self, strength: float = 1.0, p: float = 1.0) -> None:
        super().__init__(p=p)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie within 0 to 1, got {strength}.")
        self.strength = strength
        s = strength
        self._steps = A.Compose(
            [
                StainJitter(scale=(1 - 0.45 * s, 1 + 0.6 * s), shift=(-0.1 * s, 0.1 * s), p=1.0),
                StainSwap(strength=(0.0, s), p=SWAP_PROBABILITY),
                ScannerJitter(severity=(0.0, s), p=1.0),
                A.ColorJitter(around(0.25 * s), around(0.25 * s), around(0.4 * s), (-0.08 * s, 0.08 * s), p=0.9),
            ]
        )

    def get_params(self) -> dict[str, Any]:
        """Draw the seed of this view."""
        return {"view_seed": self.py_random.getrandbits(31)}

    def apply(self, img: Rgb, view_seed: int, **params: Any) -> Rgb:
        """Change one image."""
        if self.strength == 0:
            return img.copy()
        self._steps.set_random_seed(view_seed)
        return np.asarray(self._steps(image=img)["image"], np.uint8)


def around(spread: float) -> tuple[float, float]:
    """Range of a factor that changes by up to `spread` either way."""
    return 1 - spread, 1 + spread


def distillation_views(strength: float = 1.0) -> dict[str, list[A.BasicTransform]]:
    """Transforms of the view `student`, for `TileDataModule(photometric=...)`; the view `clean` is always there.

    Args:
        strength: of `StudentView`.
    """
    return {"student": [StudentView(strength)]}


def dino_views(
    *,
    jitter: float = 0.8,
    grey: float = 0.2,
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize: float = 0.2,
) -> dict[str, list[A.BasicTransform]]:
    """DINOv2's colour transforms for two global crops and the local ones, with the probabilities that were meant.

    DINOv2's own code hands 1 - p to its blur, so its released models were trained with 0, .9 and .5 (dinov3 issue 286).
    `pathokd.data.views.dino_crops` has the crops.

    Args:
        jitter: probability of changing brightness, contrast, saturation and hue.
        grey: probability of dropping colour; 0 suits histology, where colour is a finding.
        blur: probabilities of blurring the first global crop, the second, and the local ones.
        solarize: probability of inverting bright values of the second global crop; 0 suits histology.

    Returns:
        Transforms of the views `student`, `global2/student` and `local/student`.

    Reference:
        Oquab et al. 2023, "DINOv2"; facebookresearch/dinov2, data/augmentations.py.
    """

    def steps(blur_p: float, solarize_p: float) -> list[A.BasicTransform]:
        return [
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=jitter),
            A.ToGray(p=grey),
            A.GaussianBlur(blur_limit=(9, 9), sigma_limit=(0.1, 2.0), p=blur_p),
            A.Solarize(threshold_range=(0.5, 0.5), p=solarize_p),
        ]

    first, second, local = blur
    return {
        "student": steps(first, 0.0),
        "global2/student": steps(second, solarize),
        "local/student": steps(local, 0.0),
    }
