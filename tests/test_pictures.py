import numpy as np
import pytest

from pathokd.pictures import stack_planes


@pytest.mark.parametrize("shape", [(5, 7, 3), (2, 5, 7, 3)])
def test_planes_are_the_transposed_pictures(shape: tuple[int, ...]) -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8))
    images[1] = images[1][..., ::-1, :]  # a view, not in order
    images[2] = np.pad(images[2], [(0, 0)] * (len(shape) - 2) + [(1, 2), (0, 0)])[..., 1:-2, :]
    planes = stack_planes(images)
    assert planes.flags.c_contiguous
    np.testing.assert_array_equal(planes, np.moveaxis(np.stack(images), -1, -3))


@pytest.mark.parametrize("other", [np.zeros((2, 8, 3), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_pictures_that_differ_are_no_batch(other: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"of one size and type, got \(4, 4, 3\) uint8 and"):
        stack_planes([np.zeros((4, 4, 3), np.uint8), other])


def test_pictures_keep_their_type() -> None:
    image = np.random.default_rng(0).random((4, 6, 3), np.float32)
    np.testing.assert_array_equal(stack_planes([image])[0], image.transpose(2, 0, 1))
