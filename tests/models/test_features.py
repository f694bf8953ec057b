"""Readouts and grid resampling."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pathokd.models.features import Features, pool_patches, readout, readout_dim, resize_patches


def _features(batch: int = 2, grid: tuple[int, int] = (3, 4), dim: int = 5) -> Features:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, grid[0] * grid[1], dim, generator=generator)
    return Features(torch.randn(batch, dim, generator=generator), patches, grid)


def test_readout_values() -> None:
    features = _features()
    assert torch.equal(readout(features, "cls"), features.cls)
    mean = features.patches.sum(dim=1) / 12
    torch.testing.assert_close(readout(features, "mean"), mean)
    torch.testing.assert_close(readout(features, "cls+mean"), torch.cat([features.cls, mean], dim=1))


def test_readout_dim_matches_readout() -> None:
    features = _features()
    for kind in ("cls", "mean", "cls+mean"):
        assert readout(features, kind).shape[1] == readout_dim(5, kind)


def test_unknown_readout_is_refused(refuses: Any) -> None:
    with refuses(ValueError, "one of cls, mean"):
        readout(_features(), "pool")  # type: ignore[arg-type]
    with refuses(ValueError, "one of cls, mean"):
        readout_dim(5, "pool")  # type: ignore[arg-type]


def test_resize_same_grid_is_the_input_itself() -> None:
    features = _features()
    assert resize_patches(features.patches, (3, 4), (3, 4)) is features.patches


def test_resize_matches_interpolation_of_the_image() -> None:
    patches = torch.randn(2, 16 * 16, 7)
    image = patches.reshape(2, 16, 16, 7).permute(0, 3, 1, 2)
    wanted = F.interpolate(image, size=(14, 14), mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_patches(patches, (16, 16), (14, 14)), wanted.flatten(2).transpose(1, 2))


def test_resize_keeps_rows_and_columns_apart() -> None:
    ramp = torch.arange(4.0).repeat_interleave(6).reshape(1, 24, 1)  # value = row
    resized = resize_patches(ramp, (4, 6), (4, 3)).reshape(4, 3)
    torch.testing.assert_close(resized, torch.arange(4.0)[:, None].expand(4, 3))


@given(st.integers(1, 9), st.integers(1, 9), st.floats(-3, 3))
def test_resize_keeps_constants(rows: int, columns: int, value: float) -> None:
    patches = torch.full((1, 20, 2), value)
    resized = resize_patches(patches, (4, 5), (rows, columns))
    assert resized.shape == (1, rows * columns, 2)
    torch.testing.assert_close(resized, torch.full_like(resized, value), atol=1e-5, rtol=1e-5)


def test_resize_refuses_a_wrong_grid() -> None:
    with pytest.raises(ValueError, match="pass their own grid"):
        resize_patches(torch.zeros(1, 10, 2), (3, 3), (2, 2))
    with pytest.raises(ValueError, match="positive"):
        resize_patches(torch.zeros(1, 9, 2), (3, 3), (0, 2))


def test_pooling_is_average_pooling_where_grids_divide() -> None:
    patches = torch.randn(2, 8 * 12, 5)
    image = patches.reshape(2, 8, 12, 5).permute(0, 3, 1, 2)
    wanted = F.avg_pool2d(image, (2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_patches(patches, (8, 12), (4, 4)), wanted)
    torch.testing.assert_close(pool_patches(patches, (8, 12), (1, 1))[:, 0], patches.mean(1))


def test_pooling_is_in_fp32_under_autocast() -> None:
    patches = torch.randn(2, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_patches(patches, (8, 8), (4, 4))
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool_patches(patches, (8, 8), (4, 4)))


def test_pooling_weighs_by_area_where_they_do_not() -> None:
    """14 to 4 is the same as cutting each patch in two by two and averaging 7 by 7 of those."""
    patches = torch.randn(1, 14 * 14, 3)
    image = patches.reshape(1, 14, 14, 3).permute(0, 3, 1, 2)
    wanted = F.avg_pool2d(image.repeat_interleave(2, -1).repeat_interleave(2, -2), 7).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_patches(patches, (14, 14), (4, 4)), wanted, atol=1e-6, rtol=1e-5)


def test_pooling_refuses_a_finer_grid() -> None:
    with pytest.raises(ValueError, match="pass their own grid"):
        pool_patches(torch.zeros(1, 10, 2), (3, 3), (2, 2))
    with pytest.raises(ValueError, match="between"):
        pool_patches(torch.zeros(1, 9, 2), (3, 3), (4, 1))
