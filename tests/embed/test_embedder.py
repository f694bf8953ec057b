"""Embedder: order, sizes, precision, and agreement with the encoder itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pathokd.embed import Embedder
from pathokd.embed.images import look_up
from pathokd.errors import StoreError
from pathokd.models import Encoder, readout


def images(n: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["cls", "mean", "cls+mean"])
def test_equals_the_encoder(encoder: Encoder, kind: str) -> None:
    tiles = images(5, 56)
    embedder = Embedder(encoder, kind, batch_size=2)
    with torch.no_grad():
        want = readout(encoder(torch.from_numpy(tiles).permute(0, 3, 1, 2)), kind)
    got = embedder(tiles)
    assert got.dtype == np.float32
    assert got.shape == (5, embedder.dim)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_pixels_looked_up_are_the_encoders_to_the_bit(encoder: Encoder) -> None:
    tiles = images(3, 56)
    want = want_of(encoder, tiles)
    table = encoder.pixel_values().numpy()
    assert torch.equal(look_up(tiles, table), want)
    assert torch.equal(look_up(list(tiles[..., ::-1]), table), want_of(encoder, tiles[..., ::-1]))  # strides below 0
    padded = look_up(tiles, table, rows=4)
    assert padded.shape[0] == 4
    assert torch.equal(padded[:3], want)


def want_of(encoder: Encoder, tiles: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return encoder.preprocess(torch.from_numpy(tiles.copy()).permute(0, 3, 1, 2))


@pytest.mark.parametrize("batch", [[], images(1, 56).astype(np.float32), [images(1, 56)[0], images(1, 28)[0]]])
def test_what_cannot_be_looked_up_is_refused(encoder: Encoder, batch: Any) -> None:
    with pytest.raises(ValueError, match="all of one size, got"):
        look_up(batch, encoder.pixel_values().numpy())


def test_mixed_sizes_keep_their_order(encoder: Encoder) -> None:
    small, large = images(2, 28, 1), images(2, 56, 2)
    embedder = Embedder(encoder)
    got = embedder([small[0], large[0], large[1], small[1]])
    np.testing.assert_allclose(got[[0, 3]], embedder(small), atol=1e-5)
    np.testing.assert_allclose(got[[1, 2]], embedder(large), atol=1e-5)


def test_pictures_are_embedded_as_they_look(encoder: Encoder, tmp_path: Path) -> None:
    """Transparent pixels are white, whatever lies below; deep ones are refused rather than cut off at 255."""
    tile, embedder = images(1, 56)[0], Embedder(encoder)
    tile[:20] = 255
    alpha = np.full((56, 56, 1), 255, np.uint8)
    alpha[:20] = 0
    picture = Image.fromarray(np.concatenate([np.where(alpha > 0, tile, 0).astype(np.uint8), alpha], axis=2))
    picture.save(tmp_path / "a.png")
    want = embedder([tile])
    for image in (picture, tmp_path / "a.png"):
        np.testing.assert_array_equal(embedder([image]), want)
    deep = Image.fromarray(tile[..., 0].astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="of the kind I;16, expected 8 bits"):
        embedder([deep])
    with pytest.raises(StoreError, match="of the kind I;16, expected 8 bits"):
        embedder([tmp_path / "deep.png"])


def test_nothing_in_nothing_out(encoder: Encoder) -> None:
    assert Embedder(encoder, "cls+mean")([]).shape == (0, 96)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_returns_fp32(encoder: Encoder, precision: Any) -> None:
    tiles = images(3, 56)
    exact, fast = Embedder(encoder)(tiles), Embedder(encoder, precision=precision)(tiles)
    assert fast.dtype == np.float32
    cosine = (exact * fast).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(fast, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(exact, fast)


def test_arguments_are_checked(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"readout .*cls\+mean.* got 'CLS'"):
        Embedder(encoder, "CLS")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"precision .* got 'fp8'"):
        Embedder(encoder, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        Embedder(encoder, batch_size=0)
    with pytest.raises(ValueError, match="uint8 RGB"):
        Embedder(encoder)(np.zeros((2, 56, 56, 3), np.float32))  # type: ignore[arg-type]


def test_one_image_is_to_be_given_as_a_list(encoder: Encoder, tmp_path: Path) -> None:
    """A path was read letter by letter: "There is no image p"."""
    embedder = Embedder(encoder)
    tile = images(1, 28)[0]
    for one in (str(tmp_path / "picture.png"), tmp_path / "picture.png", tile, Image.fromarray(tile)):
        with pytest.raises(ValueError, match=r"images should be several, got .*: write \[image\] for one"):
            embedder(one)  # type: ignore[arg-type]
    assert embedder([tile]).shape == (1, embedder.dim)
