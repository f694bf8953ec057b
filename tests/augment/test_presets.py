"""The student's view: nothing at zero, more with strength, a stream per seed; DINO's explicit probabilities."""

import albumentations as A
import numpy as np
import pytest

from pathokd.augment.presets import StudentView, dino_views, distillation_views
from pathokd.data.batch import Draw
from pathokd.data.views import Geometry, Views, dino_crops
from pathokd.types import Rgb


def test_nothing_at_zero(tissue: Rgb, odd_tile: Rgb) -> None:
    for image in (tissue, odd_tile):
        assert np.array_equal(StudentView(0.0)(image=image)["image"], image)


def test_more_with_strength(tissue: Rgb) -> None:
    def distance(strength: float) -> float:
        views = [np.abs(seeded(strength, seed)(image=tissue)["image"].astype(int) - tissue) for seed in range(12)]
        return float(np.mean(views))

    steps = [distance(strength) for strength in (0.0, 0.3, 0.6, 1.0)]
    assert steps[0] == 0
    assert steps == sorted(steps)


def seeded(strength: float, seed: int) -> StudentView:
    view = StudentView(strength)
    view.set_random_seed(seed)
    return view


def test_geometry_is_kept(tissue: Rgb) -> None:
    """Edges of the perturbed view lie where those of the clean one are, so that patch tokens stay partners."""
    for seed in range(6):
        changed = seeded(0.6, seed)(image=tissue)["image"]
        a, b = (image.astype(float).mean(axis=2)[16:-16, 16:-16] for image in (tissue, changed))
        shifted = [np.corrcoef(a.ravel(), np.roll(b, s, axis=1).ravel())[0, 1] for s in (-2, 0, 2)]
        assert np.argmax(shifted) == 1


def test_seeds_and_round_trip(tissue: Rgb) -> None:
    one, two = (A.Compose([StudentView()], seed=4) for _ in range(2))
    back = A.from_dict(A.to_dict(one))
    back.set_random_seed(4)
    one.set_random_seed(4)
    two.set_random_seed(5)
    first = [one(image=tissue)["image"] for _ in range(4)]
    assert all(np.array_equal(image, back(image=tissue)["image"]) for image in first)
    assert not any(np.array_equal(image, two(image=tissue)["image"]) for image in first)
    assert len({image.tobytes() for image in first}) == 4


def test_views_of_a_tile(tissue: Rgb) -> None:
    drawn = Views(Geometry(224), distillation_views(0.6))(tissue, Draw(1, 2))
    assert set(drawn) == {"clean", "student"}
    assert not np.array_equal(drawn["clean"], drawn["student"])


def blur_share(steps: list[A.BasicTransform], image: Rgb) -> float:
    """How often a pipeline softens noise."""
    pipeline = A.Compose(steps, seed=0)
    sharp = image.astype(float).std()
    return float(np.mean([pipeline(image=image)["image"].astype(float).std() < 0.9 * sharp for _ in range(120)]))


def test_blur_has_the_probabilities_that_were_meant() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    views = dino_views(jitter=0.0, grey=0.0, solarize=0.0)
    shares = {name: blur_share(steps, noise) for name, steps in views.items()}
    # Sigmas below about 0.4 soften noise too little to count: some 15 % of the draws.
    assert shares["student"] > 0.8
    assert shares["global2/student"] < 0.2
    assert 0.3 < shares["local/student"] < 0.6


def test_multi_crop_of_a_tile(tissue: Rgb) -> None:
    drawn = Views(Geometry(224, (0.32, 1.0)), dino_views(), dino_crops(3))(tissue, Draw(0, 0))
    assert drawn["local/student"].shape == (3, 98, 98, 3)
    assert drawn["global2/student"].shape == drawn["global2"].shape == (224, 224, 3)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_strength_is_checked(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must lie within 0 to 1"):
        StudentView(strength)
