"""Images in, vectors out: a model with its readout, precision and device settled once."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathokd.models import READOUTS, Encoder, Features, Readout, load_encoder, readout_dim
from pathokd.models import readout as read_out
from pathokd.types import Rgb

Precision = Literal["auto", "fp32", "bf16"]
"""`auto` is bf16 on CUDA and fp32 elsewhere: few CPUs gain from bf16 and most lose."""


class Embedder:
    """A frozen model that turns images into one vector each.

    It normalises and resizes as the model's card says; the weights stay fp32 and bf16 is autocast. The
    model is put in eval mode and moved to `device`.

    Args:
        model: An encoder, or what `load_encoder` takes: a card's name, `hf-hub:...` or an exported folder.
        readout: How tokens become one vector; a card's `readout` names the published embedding.
        precision: Arithmetic of the forward pass.
        device: `auto` (CUDA if there is one, else the CPU) or any torch device.
        batch_size: Most images in one forward pass, at least 1.

    Raises:
        ValueError: An unknown readout or precision, or a batch size below 1.
        WeightsError: `model` is a name whose weights cannot be loaded.
    """

    def __init__(
        self,
        model: Encoder | str,
        readout: Readout = "cls",
        precision: Precision = "auto",
        device: str = "auto",
        batch_size: int = 32,
    ) -> None:
        if readout not in READOUTS:
            raise ValueError(f"readout should be one of {', '.join(READOUTS)}, got {readout!r}.")
        if precision not in get_args(Precision):
            raise ValueError(f"precision should be one of {', '.join(get_args(Precision))}, got {precision!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}.")
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        encoder = load_encoder(model) if isinstance(model, str) else model
        self.encoder = encoder.eval().to(self.device)
        self.readout: Readout = readout
        self.precision: Literal["fp32", "bf16"] = _settle(precision, self.device)
        self.batch_size = batch_size

    @property
    def dim(self) -> int:
        """Length of one vector."""
        return readout_dim(self.encoder.embed_dim, self.readout)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the weights, computed once: seconds for the largest models."""
        return self.encoder.weights_sha256

    def __call__(self, images: npt.NDArray[np.uint8] | Sequence[Rgb]) -> npt.NDArray[np.float32]:
        """Embed images.

        Args:
            images: uint8 RGB of shape (n, height, width, 3), or a sequence of (height, width, 3) whose
            sizes may differ.

        Returns:
            Float32 vectors in the order given, shape (n, dim).

        Raises:
            ValueError: An image is not uint8 RGB.
        """
        vectors = [read_out(self.features(batch), self.readout).cpu().numpy() for batch in self._batches(images)]
        return np.concatenate(vectors) if vectors else np.empty((0, self.dim), np.float32)

    def features(self, images: npt.NDArray[np.uint8]) -> Features:
        """All tokens of one batch, fp32, on the device: for uses that one vector per tile does not serve.

        Args:
            images: uint8 RGB, shape (n, height, width, 3), run as one batch.

        Returns:
            Features of n images.
        """
        tensor = _to_tensor(images).to(self.device)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            out = self.encoder(tensor)
        return Features(out.cls.float(), out.patches.float(), out.grid)

    def _batches(self, images: npt.NDArray[np.uint8] | Sequence[Rgb]) -> Iterator[npt.NDArray[np.uint8]]:
        """At most `batch_size` images of one size at a time, order kept."""
        for _, same in itertools.groupby(images, key=np.shape):
            run = list(same)
            for start in range(0, len(run), self.batch_size):
                yield np.stack(run[start : start + self.batch_size])


def _settle(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def _to_tensor(images: npt.NDArray[np.uint8]) -> Tensor:
    """Channels first, checked; the encoder does the rest."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images should be uint8 RGB of shape (n, height, width, 3), got {images.dtype} {images.shape}."
        )
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
