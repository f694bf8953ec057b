import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathokd.slides import tile_grid


def test_values() -> None:
    grid = tile_grid((1000, 500), 0.25, mpp=0.5, tile_px=100)
    assert grid.side == 200
    assert sorted(set(grid.x.tolist())) == [0, 200, 400, 600, 800]
    assert sorted(set(grid.y.tolist())) == [0, 200]
    assert len(grid.x) == len(grid.y) == 10
    assert grid.x.dtype == np.int64


def test_stride_is_never_accumulated() -> None:
    grid = tile_grid((100_000, 500), 0.2738, mpp=0.5, tile_px=224)
    step = 224 * 0.5 / 0.2738
    xs = np.unique(grid.x)
    assert np.abs(xs - np.arange(len(xs)) * step).max() <= 0.5


def test_slide_smaller_than_a_tile() -> None:
    assert len(tile_grid((100, 100), 0.5, mpp=0.5, tile_px=224).x) == 0
    assert len(tile_grid((100, 100), 0.5, mpp=0.5, tile_px=224, border="cover").x) == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="positive"):
        tile_grid((10, 10), 0.5, mpp=0.5, tile_px=0)
    with pytest.raises(ValueError, match="positive"):
        tile_grid((10, 10), 0.5, mpp=0.5, tile_px=8, stride_px=0)
    with pytest.raises(ValueError, match="border"):
        tile_grid((10, 10), 0.5, mpp=0.5, tile_px=8, border="some")  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    width=st.integers(1, 5000),
    mpp_level0=st.floats(0.1, 1.0),
    mpp=st.floats(0.1, 2.0),
    tile_px=st.integers(16, 256),
    stride=st.floats(0.2, 1.5),
)
def test_coverage(width: int, mpp_level0: float, mpp: float, tile_px: int, stride: float) -> None:
    stride_px = max(1, round(tile_px * stride))
    arguments = {"mpp": mpp, "tile_px": tile_px, "stride_px": stride_px}
    inside = tile_grid((width, width), mpp_level0, **arguments)  # type: ignore[arg-type]
    step = stride_px * mpp / mpp_level0
    pixel = mpp / mpp_level0
    if len(inside.x):
        assert inside.x.min() == 0
        assert inside.x.max() + inside.side <= width + pixel / 2 + 0.51
        # No further tile would fit.
        assert inside.x.max() + step + inside.side > width - 0.51
    else:
        assert inside.side > width
    cover = tile_grid((width, width), mpp_level0, border="cover", **arguments)  # type: ignore[arg-type]
    assert set(inside.x.tolist()) <= set(cover.x.tolist())
    assert cover.x.max() < width
    if stride_px <= tile_px:
        assert cover.x.max() + cover.side >= width - 0.51
