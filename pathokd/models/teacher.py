"""A model that is looked at and never changed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pathokd.models.cards import ModelCard
from pathokd.models.encoder import load_encoder
from pathokd.models.features import Features
from pathokd.models.vit import Encoder
from pathokd.models.weights import state_sha256

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher, and how it runs.

    Args:
        weights: a card's name, `hf-hub:...`, `local-dir:...`, a folder, or a `.safetensors` file. Beside `targets` it
            may be left out; weights that are named are compared with those the targets are of.
        targets: folder that `pathokd cache` wrote: the teacher is not run, what it said is read.
        precision: `bf16` halves the memory of the weights; features are fp32 either way.
        micro_batch: tiles per forward pass; None takes the whole batch at once.
        pretrained: False builds the architecture with random weights, for tests and memory checks.
        image_px: another input side than the card's.
        card: name of the card that describes the weights of a folder or file.
        architecture: timm name that describes the weights of a bare file, in place of a card.
        model_args: arguments of the timm model; a smaller `depth` keeps the first blocks of the file only.
        mean: per-channel input mean, in place of the card's.
        std: per-channel input divisor, in place of the card's.
        mpp: microns per pixel the teacher expects, in place of the card's.
        denoise: file of `pathokd denoise`: what it holds is projected out of the tokens that the student is compared
            with. `val/cosine_cls` is then a cosine to the denoised teacher; CKA and k-NN overlap stay with the teacher
            as it is. Prototype losses see raw tokens, which their prototypes were made of.

    Raises:
        ValueError: a field is out of its range.
    """

    weights: str = ""
    precision: Precision = "fp32"
    micro_batch: int | None = None
    pretrained: bool = True
    image_px: int | None = None
    card: str | None = None
    architecture: str | None = None
    model_args: dict[str, Any] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    mpp: float | None = None
    targets: str | None = None
    denoise: str | None = None

    def __post_init__(self) -> None:
        if not self.weights and self.targets is None:
            raise ValueError(
                "weights must name a teacher: a card, hf-hub:OWNER/NAME, a folder or a .safetensors file; or targets "
                "must name a folder of `pathokd cache`."
            )
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or null, got {self.micro_batch}.")
        if self.image_px is not None and self.image_px < 1:
            raise ValueError(f"image_px must be at least 1 or null, got {self.image_px}.")


class Teacher(nn.Module):
    """An encoder frozen for ever: eval mode, no gradients, its own normalisation, fp32 features.

    The encoder hangs beside the module tree, not in it. It follows the teacher to another device, yet it has
    no parameters to optimise or synchronise, is never part of a `state_dict`, and so never of a checkpoint.

    Args:
        encoder: the model; it is frozen in place and, for `bf16`, its weights are cast in place.
        precision: `fp32` or `bf16`, of weights and computation. An autocast around the teacher has no effect
            on it.
        micro_batch: tiles per forward pass; None takes the whole batch.

    Raises:
        ValueError: unknown precision.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, *, precision: Precision = "fp32", micro_batch: int | None = None) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be fp32 or bf16, got {precision!r}.")
        encoder.eval().requires_grad_(False)
        if precision == "bf16":
            encoder.model.to(torch.bfloat16)
        self.__dict__["encoder"] = encoder
        self.precision: Precision = precision
        self.micro_batch = micro_batch
        super().train(False)

    @property
    def card(self) -> ModelCard:
        """The encoder's card."""
        return self.encoder.card

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.encoder.mean.device

    @property
    def embed_dim(self) -> int:
        """Width of a token."""
        return self.encoder.embed_dim

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the weights as they run (bf16 if so asked), computed once: seconds for the largest models."""
        return self.encoder.weights_sha256

    @cached_property
    def weights_sha256_bf16(self) -> str:
        """Hash of the weights as they are in bf16, by which a teacher that runs in fp32 knows itself again there."""
        if self.precision == "bf16":
            return self.weights_sha256
        return state_sha256(self.encoder.model.state_dict(), torch.bfloat16)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever `mode` says."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
    ) -> Features:
        """Encode tiles without gradients.

        Args:
            images: RGB, uint8 in 0 to 255 or float in 0 to 1.

        Returns:
            fp32 features that can enter a loss (plain tensors, not inference tensors).
        """
        with torch.autocast(images.device.type, enabled=False):
            chunks = torch.split(images, self.micro_batch) if self.micro_batch else (images,)
            parts = [self.encoder(chunk) for chunk in chunks]
        cls = torch.cat([part.cls.float() for part in parts])
        patches = torch.cat([part.patches.float() for part in parts])
        return Features(cls=cls, patches=patches, grid=parts[0].grid)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Teacher":
        """Carry the encoder along to another device; a change of dtype is ignored."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        self.encoder._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def build_teacher(spec: TeacherSpec) -> Teacher:
    """Load the encoder that `spec` names and freeze it.

    Raises:
        ValueError: an unknown name or argument.
        WeightsError: weights missing, gated, offline, damaged, or not of this architecture.
    """
    encoder = load_encoder(
        spec.weights,
        pretrained=spec.pretrained,
        image_px=spec.image_px,
        card=spec.card,
        architecture=spec.architecture,
        model_args=spec.model_args,
        mean=spec.mean,
        std=spec.std,
        mpp=spec.mpp,
    )
    return Teacher(encoder, precision=spec.precision, micro_batch=spec.micro_batch)
