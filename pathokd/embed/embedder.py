"""Images in, vectors out: a model with its readout, precision and device settled once."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pathokd.augment.images import read_image
from pathokd.embed.facts import ModelFacts, embedding_header, geometry_attrs, mismatches, model_attrs
from pathokd.embed.slide import EmbeddedSlide
from pathokd.embed.tiles import Reading, embed_tiles
from pathokd.errors import SlideError
from pathokd.models import READOUTS, Encoder, Features, Readout, VectorEncoder, readout_dim
from pathokd.models import readout as read_out
from pathokd.models.outside import Transform
from pathokd.models.plugins import as_encoder
from pathokd.progress import Bars
from pathokd.slides.manifest import TileSpec
from pathokd.slides.slide import Slide
from pathokd.slides.sources import SlideSource
from pathokd.slides.tile import cut_slide
from pathokd.types import Mpp, Rgb

Images: TypeAlias = npt.NDArray[np.uint8] | Tensor | Sequence["Rgb | Image.Image | Tensor | str | Path"]
"""uint8 RGB: an array (n, height, width, 3), a tensor (n, 3, height, width), or a sequence of images, each an array
(height, width, 3), a PIL image, a tensor (3, height, width) or the path of a picture."""
Precision = Literal["auto", "fp32", "bf16"]
"""`auto` is bf16 on CUDA and fp32 elsewhere: few CPUs gain from bf16 and most lose."""


class Embedder:
    """A frozen model that turns images into one vector each.

    It normalises and resizes as the model's card says, or by the transform of a network from elsewhere; the weights
    stay fp32 and bf16 is autocast. The model is put in eval mode and moved to `device`.

    Args:
        model: An encoder, or what `load_encoder` takes: a card's name, `hf-hub:...` or an exported folder; or the name
            of an encoder that another package offers (see `pathokd.models.plugins`); or any torch module that returns
            one vector per image, with its `transform`.
        readout: How tokens become one vector; a card's `readout` names the published embedding.
        precision: Arithmetic of the forward pass.
        device: `auto` (CUDA if there is one, else the CPU) or any torch device.
        batch_size: Most images in one forward pass, at least 1.
        transform: For a plain torch module: from a PIL picture (RGB) to a tensor (channels, height, width), resizing
            and normalising included.

    Raises:
        ValueError: An unknown readout or precision, a batch size below 1, or a transform missing or out of place.
        WeightsError: `model` is a name whose weights cannot be loaded.
    """

    def __init__(
        self,
        model: Encoder | VectorEncoder | nn.Module | str,
        readout: Readout = "cls",
        precision: Precision = "auto",
        device: str = "auto",
        batch_size: int = 32,
        *,
        transform: Transform | None = None,
    ) -> None:
        if readout not in READOUTS:
            raise ValueError(f"readout should be one of {', '.join(READOUTS)}, got {readout!r}.")
        if precision not in get_args(Precision):
            raise ValueError(f"precision should be one of {', '.join(get_args(Precision))}, got {precision!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}.")
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        encoder = as_encoder(model, transform)
        if isinstance(encoder, VectorEncoder) and readout != "cls":
            raise ValueError(
                f"readout chooses among tokens, and {encoder.card.name} returns one vector per image: leave it out."
            )
        self.encoder: Encoder | VectorEncoder = encoder.eval().to(self.device)
        self.readout: Readout = readout
        self.precision: Literal["fp32", "bf16"] = _settle(precision, self.device)
        self.batch_size = batch_size

    @cached_property
    def dim(self) -> int:
        """Length of one vector; a network from elsewhere is run on a white picture to learn it."""
        if isinstance(self.encoder, Encoder):
            return readout_dim(self.encoder.embed_dim, self.readout)
        side = self.encoder.card.image_px
        return int(self._vectors(np.full((1, side, side, 3), 255, np.uint8)).shape[1])

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the weights, computed once: seconds for the largest models."""
        return self.encoder.weights_sha256

    @property
    def facts(self) -> ModelFacts:
        """What files say of this model."""
        readout = self.readout if isinstance(self.encoder, Encoder) else "output"
        return ModelFacts(self.encoder.card, self.weights_sha256, readout, self.precision)

    def __call__(self, images: Images) -> npt.NDArray[np.float32]:
        """Embed images.

        Args:
            images: See `Images`; sizes may differ within a sequence.

        Returns:
            Float32 vectors in the order given, shape (n, dim).

        Raises:
            ValueError: An image is not uint8 RGB.
            StoreError: A path leads to no picture.
        """
        vectors = [self._vectors(batch).cpu().numpy() for batch in self._batches(images)]
        return np.concatenate(vectors) if vectors else np.empty((0, self.dim), np.float32)

    def tokens(self, images: Images) -> npt.NDArray[np.float32]:
        """Patch tokens of images of one size, as grids.

        Args:
            images: See `Images`.

        Returns:
            Float32, shape (n, rows, columns, width of a token); row by row as the patches lie in the image.

        Raises:
            ValueError: No image, images of several sizes, or one that is not uint8 RGB.
        """
        batches = [self.features(batch) for batch in self._batches(images)]
        if len({features.grid for features in batches}) != 1:
            raise ValueError("tokens() takes at least one image, and images of one size: call it once per size.")
        rows, columns = batches[0].grid
        patches = torch.cat([features.patches for features in batches]).cpu().numpy()
        return np.asarray(patches.reshape(len(patches), rows, columns, -1), np.float32)

    def slide(
        self,
        path: str | Path,
        *,
        mpp: Mpp | None = None,
        tile_px: int | None = None,
        stride_px: int | None = None,
        min_tissue: float = 0.25,
        mpp_level0: Mpp | None = None,
        workers: int = 2,
    ) -> EmbeddedSlide:
        """Find the tissue of a slide and embed its tiles, in memory.

        Args:
            path: The slide.
            mpp: Microns per pixel of a tile; by default the card's, else 0.5.
            tile_px: Side of a tile; by default the card's input.
            stride_px: Step between tiles; by default the side.
            min_tissue: Least share of a tile that is tissue.
            mpp_level0: Microns per level-0 pixel where the slide does not say.
            workers: Threads that read ahead.

        Returns:
            Features, coordinates and flags, with `save`, `heatmap` and `to_anndata`.

        Raises:
            SlideError: The slide cannot be used, or holds no tile with enough tissue.
        """
        card = self.encoder.card
        spec = TileSpec(mpp or card.mpp or 0.5, tile_px or card.image_px, stride_px, min_tissue)
        for sentence in mismatches(card, spec):
            warnings.warn(sentence, stacklevel=2)
        source = SlideSource(Path(path).stem, Path(path).absolute(), mpp_level0)
        with Slide(path, mpp=mpp_level0) as slide, Bars() as bars:
            tiles = cut_slide(slide, source, spec).kept
            if tiles.empty:
                raise SlideError(f"{path} holds no tile with {min_tissue:.0%} tissue: look at it, or lower min_tissue.")
            reading = Reading(self.batch_size, workers)
            features, flags = embed_tiles(self, self.dim, slide, tiles, spec, reading, bars)
            header = embedding_header(self.facts, source.slide_id, tiles, spec, "fp32")
            return EmbeddedSlide(
                source.path,
                features,
                tiles[["x", "y"]].to_numpy(np.int64),
                flags,
                tiles["tissue_fraction"].to_numpy(np.float32),
                {
                    "header": header,
                    "coords": geometry_attrs(slide, source.slide_id, tiles, spec),
                    "features": model_attrs(self.facts, source.slide_id, header, spec),
                },
            )

    def features(self, images: npt.NDArray[np.uint8]) -> Features:
        """All tokens of one batch, fp32, on the device: for uses that one vector per tile does not serve.

        Args:
            images: uint8 RGB, shape (n, height, width, 3), run as one batch.

        Returns:
            Features of n images.

        Raises:
            ValueError: The model is from elsewhere and has no tokens to show.
        """
        if not isinstance(self.encoder, Encoder):
            raise ValueError(f"{self.encoder.card.name} returns one vector per image and no tokens: call it instead.")
        out = self._run(_to_tensor(images))
        return Features(out.cls.float(), out.patches.float(), out.grid)

    def _vectors(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """Vectors of one batch, fp32, on the device."""
        if isinstance(self.encoder, Encoder):
            return read_out(self.features(images), self.readout)
        vectors: Tensor = self._run(self.encoder.prepare(images))
        return vectors.float()

    def _run(self, pixels: Tensor) -> Any:
        """The model's forward pass, in the embedder's precision."""
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            return self.encoder(pixels.to(self.device))

    def _batches(self, images: Images) -> Iterator[npt.NDArray[np.uint8]]:
        """At most `batch_size` images of one size at a time, order kept."""
        for _, same in itertools.groupby(map(_as_rgb, images), key=np.shape):
            while run := list(itertools.islice(same, self.batch_size)):
                yield np.stack(run)


def _as_rgb(image: object) -> Rgb:
    """One image as an array (height, width, 3), whatever it came as."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = image.movedim(0, -1).cpu().numpy() if image.ndim == 3 else image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"each image should be uint8 RGB, (height, width, 3), or a picture, got {what}.")
    return image


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
