"""Any timm vision transformer as one thing: pixels in, class token and patch tokens out."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pathokd.models.build import is_dynamic
from pathokd.models.cards import ModelCard, nearest_multiple
from pathokd.models.features import Features
from pathokd.models.weights import state_sha256


class Encoder(nn.Module):
    """A timm vision transformer with its card; it normalises and resizes its own input.

    Token 0 after the final norm is the class token; the remaining `num_prefix_tokens - 1` are registers and
    are left out; the rest are patches. timm's `global_pool` plays no part. A model built with
    `dynamic_img_size` takes any size, square or not, whose sides are multiples of the patch; any other model
    takes squares, which are resized to the card's `image_px` (area averaging for whole ratios, antialiased
    bilinear otherwise).

    Args:
        model: timm model built by `pathokd.models.build.build_timm`.
        card: its facts; mean, std, patch and input size are taken from here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, card: ModelCard) -> None:
        super().__init__()
        self.model = model
        self.card = card
        self.register_buffer("mean", torch.tensor(card.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(1, 3, 1, 1), persistent=False)
        self._prefix = int(model.num_prefix_tokens)
        self._dynamic = is_dynamic(model)

    @property
    def embed_dim(self) -> int:
        """Width of a token."""
        return self.card.embed_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, which `preprocess` gives its pixels."""
        dtype: torch.dtype = self.model.patch_embed.proj.weight.dtype
        return dtype

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch tokens at the card's `image_px`."""
        return self.card.grid

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights: names, dtypes, shapes, bytes. Computed at each access (ViT-g: seconds)."""
        return state_sha256(self.model.state_dict())

    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
    ) -> Features:
        """Encode tiles.

        Args:
            images: RGB, uint8 in 0 to 255 or float in 0 to 1, not normalised.

        Returns:
            Features in the dtype of the weights (or of autocast).

        Raises:
            ValueError: a size the model cannot take.
            TypeError: neither uint8 nor float.
        """
        return self.encode(self.preprocess(images))

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Features:
        """The part of `forward` after `preprocess`, for callers that do the two apart.

        Args:
            pixels: what `preprocess` returned.

        Returns:
            As `forward`.
        """
        height, width = pixels.shape[-2:]
        tokens = self.model.forward_features(pixels)
        grid = (height // self.card.patch_px, width // self.card.patch_px)
        return Features(cls=tokens[:, 0], patches=tokens[:, self._prefix :], grid=grid)

    def preprocess(
        self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 new_height new_width"]:
        """Convert to fp32 where the images are, resize if needed, normalise, cast to the weights' dtype."""
        if images.dtype == torch.uint8:
            # In place, the copy being ours: on a CPU fresh memory for each step takes longer than its arithmetic.
            pixels = self._resize(images.float().div_(255)).sub_(self.mean.float()).div_(self.std.float())
        elif images.is_floating_point():
            pixels = (self._resize(images.float()) - self.mean.float()) / self.std.float()
        else:
            raise TypeError(f"images must be uint8 (0 to 255) or float (0 to 1), got {images.dtype}.")
        return pixels.to(self.dtype)

    def takes_as_is(self, height: int, width: int) -> bool:
        """Whether images of this size are neither resized nor refused."""
        patch, side = self.card.patch_px, self.card.image_px
        return (height % patch == width % patch == 0) if self._dynamic else height == width == side

    def pixel_values(self) -> Float[Tensor, "256 3"]:
        """What `preprocess` makes of each uint8 value of each channel, in fp32: for callers that look pixels up."""
        values = torch.arange(256, device=self.mean.device).float().div_(255)[:, None]
        return (values - self.mean.float().view(1, 3)) / self.std.float().view(1, 3)

    def _resize(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        patch, side = self.card.patch_px, self.card.image_px
        if self._dynamic:
            if height % patch or width % patch:
                raise ValueError(
                    f"{self.card.name} takes sides that are multiples of {patch} px, got {height} x {width}: "
                    f"the nearest is {nearest_multiple(height, patch)} x {nearest_multiple(width, patch)}."
                )
            return pixels
        if height != width:
            raise ValueError(
                f"{self.card.name} takes square tiles, got {height} x {width}: cut squares, or build the "
                "model with dynamic_img_size: true."
            )
        return resize_square(pixels, side)


def resize_square(pixels: Float[Tensor, "batch 3 old old"], side: int) -> Float[Tensor, "batch 3 new new"]:
    """Resize square images to `side`: area averaging for whole ratios, antialiased bilinear otherwise."""
    old = pixels.shape[-1]
    if old == side:
        return pixels
    if old % side == 0:
        return F.interpolate(pixels, size=(side, side), mode="area")
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
