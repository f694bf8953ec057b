"""Any network that gives one vector per image, with its own preprocessing: encoders that no card describes."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pathokd.errors import WeightsError
from pathokd.models.weights import state_sha256

Transform = Callable[[Image.Image], Tensor]
"""From an RGB picture to what the network takes, (channels, height, width)."""
DEFAULT_PX = 224


class OutsideCard(NamedTuple):
    """What can be known of a network from elsewhere."""

    name: str
    encoder_class: str
    transform: str
    """What the transform says of itself; see `describe`."""
    image_px: int = DEFAULT_PX
    """Side of a tile by default; the transform may resize it."""
    mpp: float | None = None


class VectorEncoder(nn.Module):
    """A network from elsewhere: pictures through its transform, then one vector each.

    Args:
        module: Its forward takes (n, channels, height, width) and returns floating-point (n, d).
        transform: From a PIL picture (RGB) to one input tensor; also what normalises, since the network gets nothing
            else.
        name: Of the encoder in files; by default the module's class.

    Raises:
        TypeError: `module` is no network, or `transform` cannot be called.
    """

    def __init__(self, module: nn.Module, transform: Transform, name: str | None = None) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"an encoder from elsewhere should be a torch.nn.Module, got {type(module).__name__}.")
        if not callable(transform):
            raise TypeError(f"transform should turn a PIL picture into a tensor, got {type(transform).__name__}.")
        self.module = module
        self.transform = transform
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        self.card = OutsideCard(name or type(module).__name__, kind, describe(transform))

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the module's state, as `Encoder.weights_sha256`; computed at each access.

        Raises:
            WeightsError: The state holds something that is no tensor.
        """
        state = self.module.state_dict()
        odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
        if odd:
            raise WeightsError(
                f"The state of {self.card.name} holds {odd[0]}, which is no tensor, so its weights cannot be told "
                "apart: keep such settings out of state_dict()."
            )
        return state_sha256(state)

    def prepare(self, images: Iterable[npt.NDArray[np.uint8]]) -> Tensor:
        """Pictures as the network takes them.

        Args:
            images: uint8 RGB, each (height, width, 3).

        Returns:
            What the transform made of each, stacked.

        Raises:
            ValueError: The transform returns no tensor of three axes, or tensors of several shapes.
        """
        made: list[Any] = [self.transform(Image.fromarray(image)) for image in images]
        for value in made:
            if not isinstance(value, Tensor) or value.ndim != 3 or value.shape != made[0].shape:
                raise ValueError(
                    f"transform of {self.card.name} should return tensors (channels, height, width) of one shape, "
                    f"got {_what(value)}."
                )
        return torch.stack(made)

    def forward(self, pixels: Tensor) -> Tensor:
        """Vectors, shape (n, d).

        Args:
            pixels: From `prepare`.

        Raises:
            ValueError: The network returns something else.
        """
        out: Any = self.module(pixels)
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(pixels) or not out.is_floating_point():
            raise ValueError(
                f"{self.card.name} should return one vector per image, a floating-point tensor ({len(pixels)}, d), "
                f"got {_what(out)}: wrap it in a module whose forward does."
            )
        return out


def describe(transform: Any) -> str:
    """What a transform says of itself, the same in every process: its name, or its repr without addresses.

    A constant changed inside a function does not show; torchvision's and timm's transforms state theirs.
    """
    if hasattr(transform, "__qualname__"):
        return f"{transform.__module__}.{transform.__qualname__}"
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))).strip()


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
