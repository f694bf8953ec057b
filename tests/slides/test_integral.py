import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.slides.integral import box_sums, integral


def brute(image: np.ndarray, left: float, top: float, width: float, height: float) -> float:
    """Sum over pixels of value times overlap, the definition."""
    rows, columns = np.arange(image.shape[0]), np.arange(image.shape[1])
    in_x = np.clip(np.minimum(columns + 1, left + width) - np.maximum(columns, left), 0, None)
    in_y = np.clip(np.minimum(rows + 1, top + height) - np.maximum(rows, top), 0, None)
    return float(in_y @ image @ in_x)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    left=st.floats(-5, 14),
    top=st.floats(-5, 12),
    width=st.floats(0.01, 20),
    height=st.floats(0.01, 20),
)
def test_against_the_definition(seed: int, left: float, top: float, width: float, height: float) -> None:
    image = np.random.default_rng(seed).random((9, 11))
    got = box_sums(integral(image), np.array([left]), np.array([top]), width, height)
    assert np.allclose(got, brute(image, left, top, width, height), atol=1e-9)
