"""Probing a labelled array, small and real."""

from pathlib import Path

import numpy as np
import pytest

from pathokd.errors import StoreError
from pathokd.evaluate import probe_images
from pathokd.evaluate.images import resize
from pathokd.models import Encoder, load_encoder


def test_colours_are_told_apart(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    base = np.array([[220, 120, 180], [120, 80, 170], [245, 240, 235]])[labels]
    images = np.clip(base[:, None, None] + rng.normal(0, 15, (60, 28, 28, 3)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "tiles.npz", images=images, labels=labels[:, None])
    got = probe_images(encoders["student"], tmp_path / "tiles.npz", readout="mean")
    assert got.accuracy > 0.95
    assert got.knn10_accuracy > 0.95
    assert (got.n, got.n_groups, got.n_classes) == (60, 60, 3)


def test_resize_is_the_identity_at_the_same_size_and_keeps_the_mean() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    assert resize(images, 28) is images
    large = resize(images, 224)
    assert large.shape == (2, 224, 224, 3)
    assert large.mean() == pytest.approx(images.mean(), abs=1.5)


def test_other_files_are_refused(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="images and labels"):
        probe_images(encoders["student"], tmp_path / "none.npz")
    np.savez(tmp_path / "grey.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.zeros(4))
    with pytest.raises(StoreError, match=r"uint8 images .* got uint8 \(4, 28, 28\)"):
        probe_images(encoders["student"], tmp_path / "grey.npz")


@pytest.mark.slow
def test_the_probe_reproduces_published_figures(real_data: Path) -> None:
    """shared/data states .864 / .789 for the saliency-tuned ViT-S after block 6 (CLS+mean, 224 px)."""
    weights = next((real_data / "weights").glob("vit_small_patch14_dinov2*.safetensors"))
    model = load_encoder(
        weights,
        architecture="vit_small_patch14_dinov2",
        model_args={"depth": 6, "dynamic_img_size": True},
        image_px=224,
    )
    tiles = real_data / "tiles_pathmnist1k" / "pathmnist_train1000.npz"
    got = probe_images(model, tiles, readout="cls+mean")
    assert got.accuracy == pytest.approx(0.864, abs=0.03)
    assert got.knn10_accuracy == pytest.approx(0.789, abs=0.03)


def test_real_tiles_are_readable(real_data: Path, encoders: dict[str, Encoder]) -> None:
    """PathMNIST with an untrained toy model: above chance (1 in 9) by colour alone."""
    got = probe_images(encoders["student"], real_data / "tiles_pathmnist1k" / "pathmnist_train1000.npz", readout="mean")
    assert (got.n, got.n_classes) == (1000, 9)
    assert got.ci[0] > 0.2


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.arange(12) % 4, "got 4 classes, the smallest of 3"),
        (np.zeros(12, int), "got 1 classes, the smallest of 12"),
        (np.arange(12) / 7, "labels that are whole numbers or words, got float64"),
    ],
)
def test_labels_that_cannot_be_probed(
    labels: np.ndarray, sentence: str, encoders: dict[str, Encoder], tmp_path: Path
) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((12, 28, 28, 3), np.uint8), labels=labels)
    with pytest.raises(StoreError, match=sentence):
        probe_images(encoders["student"], tmp_path / "few.npz")
