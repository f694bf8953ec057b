"""Images as they come, made into batches on a device."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pathokd.pictures import as_array, read_image
from pathokd.types import Rgb

Images: TypeAlias = npt.NDArray[np.uint8] | Tensor | Sequence["Rgb | Image.Image | Tensor | str | Path"]
"""uint8 RGB: an array (n, height, width, 3), a tensor (n, 3, height, width), or a sequence of images, each an array
(height, width, 3), a PIL image, a tensor (3, height, width) or the path of a picture."""
Batch: TypeAlias = Sequence[Rgb] | npt.NDArray[np.uint8]
"""Images of one size: arrays (height, width, 3), or one array (n, height, width, 3)."""


def in_batches(images: Images, batch_size: int) -> Iterator[list[Rgb]]:
    """At most `batch_size` images of one size at a time, order kept.

    Raises:
        ValueError: An image is not uint8 RGB.
        StoreError: A path leads to no picture.
    """
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3):
        what = f"the path {images}" if isinstance(images, str | Path) else "one image"
        raise ValueError(f"images should be several, got {what}: write [image] for one.")
    for _, same in itertools.groupby(map(as_rgb, images), key=np.shape):
        while run := list(itertools.islice(same, batch_size)):
            yield run


def as_rgb(image: object) -> Rgb:
    """One image as an array (height, width, 3), whatever it came as."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return as_array(image)
    if isinstance(image, Tensor):
        image = image.movedim(0, -1).cpu().numpy() if image.ndim == 3 else image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"each image should be uint8 RGB, (height, width, 3), or a picture, got {what}.")
    return image


def to_device(images: Batch, device: torch.device, rows: int | None = None) -> Tensor:
    """One uint8 tensor (n, 3, height, width) on the device, by one copy of whole pixels.

    Channels stay last in memory, since the patch embedding takes them either way. For CUDA the images are stacked in
    pinned memory and the copy is not waited for.

    Args:
        images: One size.
        device: Where to.
        rows: Fill up with black images to so many, for models compiled for one batch size.

    Raises:
        ValueError: The images are not uint8 RGB of one size.
    """
    shape = _one_shape(images)
    missing = max(0, (rows or 0) - len(images))
    pinned = device.type == "cuda"
    if isinstance(images, np.ndarray) and not missing and not pinned:
        batch = torch.from_numpy(np.ascontiguousarray(images))
    else:
        batch = torch.empty((len(images) + missing, *shape), dtype=torch.uint8, pin_memory=pinned)
        np.stack(list(images), out=batch.numpy()[: len(images)])
        batch[len(images) :] = 0
    return batch.to(device, non_blocking=pinned).permute(0, 3, 1, 2)


def look_up(images: Batch, values: npt.NDArray[np.float32], rows: int | None = None) -> Tensor:
    """Normalised images (n, 3, height, width) on the CPU, each pixel looked up; channels last in memory.

    The very numbers of `Encoder.preprocess` in a tenth of its time: four passes over fresh memory become one.

    Args:
        images: One size.
        values: Shape (256, 3), from `Encoder.pixel_values`.
        rows: As in `to_device`.

    Raises:
        ValueError: The images are not uint8 RGB of one size.
    """
    batch = torch.empty((max(len(images), rows or 0), *_one_shape(images)))
    table = np.ascontiguousarray(values[:, None])
    for image, into in zip(images, batch.numpy(), strict=False):
        cv2.LUT(image, table, dst=into)
    batch[len(images) :] = 0
    return batch.permute(0, 3, 1, 2)


def _one_shape(images: Batch) -> tuple[int, ...]:
    """The shape that all images share: OpenCV writes where it is told only if it need not reshape."""
    kinds = {(str(np.asarray(image).dtype), np.asarray(image).shape) for image in images}
    dtype, shape = next(iter(kinds), ("nothing", ()))
    if len(kinds) != 1 or dtype != "uint8" or len(shape) != 3 or shape[-1] != 3:
        got = ", ".join(f"{dtype} {shape}" for dtype, shape in sorted(kinds)) or "nothing"
        raise ValueError(f"images should be uint8 RGB of shape (n, height, width, 3), all of one size, got {got}.")
    return shape
