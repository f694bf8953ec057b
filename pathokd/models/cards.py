"""The static facts of a model, as data: where its tokens sit, what it was fed, who may use it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pathokd.models.features import READOUTS, Readout, readout_dim

KeyLayout = Literal["timm", "transformers"]
"""How the published file names its weights: timm's names, or those of transformers' `Dinov2Model`."""


@dataclass(frozen=True)
class ModelCard:
    """Everything about a published model that its weights do not say.

    Args:
        name: short lower-case name.
        source: `hf-hub:OWNER/NAME`, a folder or a file; empty if the weights come from nowhere.
        architecture: name of a timm vision transformer.
        model_args: keyword arguments of the timm model, JSON-able (`mlp_layer: SwiGLUPacked` as a string).
        embed_dim: width of a token.
        depth: number of transformer blocks.
        patch_px: side of a patch in pixels.
        num_prefix_tokens: tokens before the first patch: the class token and the registers.
        image_px: side of the square input the model is used at.
        mpp: microns per pixel the model expects; None if it was not trained on slides.
        mean: per-channel mean (RGB, pixel range 0 to 1) subtracted from the input.
        std: per-channel divisor of the input.
        readout: the published embedding.
        licence: SPDX identifier, or a plain name for a licence that has none.
        gated: whether access must be requested at the source.
        params: number of parameters at `image_px`.
        key_layout: naming of the published weights.

    Raises:
        ValueError: a field is out of its range.
    """

    name: str
    source: str
    architecture: str
    embed_dim: int
    depth: int
    patch_px: int
    num_prefix_tokens: int
    image_px: int
    mpp: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    readout: Readout
    licence: str
    gated: bool
    params: int
    model_args: dict[str, Any] = field(default_factory=dict, hash=False)
    key_layout: KeyLayout = "timm"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "patch_px", "num_prefix_tokens", "image_px", "params"):
            if getattr(self, name) < 1:
                raise ValueError(f"Card {self.name!r}: {name} must be at least 1, got {getattr(self, name)}.")
        if self.image_px % self.patch_px:
            raise ValueError(
                f"Card {self.name!r}: image_px must be a multiple of patch_px {self.patch_px}, got "
                f"{self.image_px}; "
                f"the nearest is {nearest_multiple(self.image_px, self.patch_px)}."
            )
        if self.mpp is not None and not 0.05 <= self.mpp <= 20:
            raise ValueError(f"Card {self.name!r}: mpp must lie in 0.05 to 20 um per pixel, got {self.mpp}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"Card {self.name!r}: mean and std need three values and std must be positive.")
        if self.readout not in READOUTS:
            raise ValueError(f"Card {self.name!r}: readout must be one of {', '.join(READOUTS)}, got {self.readout!r}.")

    @property
    def readout_dim(self) -> int:
        """Length of the published embedding."""
        return readout_dim(self.embed_dim, self.readout)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patch tokens at `image_px`."""
        side = self.image_px // self.patch_px
        return side, side


def nearest_multiple(value: int, step: int) -> int:
    """The positive multiple of `step` nearest to `value`."""
    return max(step, round(value / step) * step)
