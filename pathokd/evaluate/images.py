"""Probe a model on a labelled array of small images, such as a MedMNIST subset."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold

from pathokd.embed import Embedder
from pathokd.errors import StoreError
from pathokd.evaluate.probes import ProbeResult, cross_probe
from pathokd.models import Encoder, Readout

FOLDS = 5


def probe_images(
    model: Encoder | str,
    npz_path: str | Path,
    *,
    readout: Readout = "cls",
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> ProbeResult:
    """Stratified 5-fold probe and 10-NN; each image is its own group, since nothing is known of slides.

    Args:
        model: An encoder, a card's name, `hf-hub:...` or an exported folder.
        npz_path: File with `images`, uint8 (n, h, w, 3), and `labels`, (n,) or (n, 1).
        readout: How tokens become one vector.
        batch_size: Images per forward pass.
        seed: Of the folds and of the resampling.
        device: `auto` or a torch device.

    Returns:
        Balanced accuracies with intervals over all images, each tested once.

    Raises:
        StoreError: The file is missing or holds no such arrays.
    """
    images, labels = _load(Path(npz_path))
    embedder = Embedder(model, readout, "fp32", device, batch_size)
    side = embedder.encoder.card.image_px
    x = np.concatenate([embedder(resize(images[i : i + batch_size], side)) for i in range(0, len(images), batch_size)])
    folds = np.empty(len(labels), np.int64)
    for fold, (_, test) in enumerate(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, labels)):
        folds[test] = fold
    return cross_probe(x, labels, folds, seed=seed)


def resize(images: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Resize to squares, bicubic, antialiased when shrinking; else a dynamic model would see a few tokens."""
    if images.shape[1:3] == (side, side):
        return images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    out: npt.NDArray[np.uint8] = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return out


def _load(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"].reshape(-1)
    except (OSError, KeyError, ValueError) as error:
        raise StoreError(f"{path} should be an .npz with the arrays images and labels: {error}.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(labels):
        raise StoreError(
            f"{path} should hold uint8 images (n, h, w, 3) with one label each, got {images.dtype} "
            f"{images.shape} and {len(labels)} labels."
        )
    if labels.dtype.kind not in "biuUS":
        raise StoreError(f"{path} should hold labels that are whole numbers or words, got {labels.dtype}.")
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2 or counts.min(initial=FOLDS) < FOLDS:
        fewest = int(counts.min(initial=len(labels)))
        raise StoreError(
            f"{path} should hold two classes or more of {FOLDS} images or more each, got {len(names)} classes, the "
            f"smallest of {fewest}: leave rare ones out, or add images."
        )
    return images, labels
