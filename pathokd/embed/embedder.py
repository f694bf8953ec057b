"""Images in, vectors out: a model with its readout, precision and device settled once."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathokd.embed.facts import ModelFacts, embedding_header, geometry_attrs, mismatches, model_attrs
from pathokd.embed.images import Batch, Images, in_batches, look_up, to_device
from pathokd.embed.slide import EmbeddedSlide
from pathokd.embed.speed import Spent
from pathokd.embed.tiles import Reading, embed_tiles
from pathokd.errors import SlideError
from pathokd.models import READOUTS, Encoder, Features, Readout, VectorEncoder, readout_dim
from pathokd.models import readout as read_out
from pathokd.models.device import choose_device
from pathokd.models.outside import Transform
from pathokd.models.plugins import as_encoder
from pathokd.progress import Bars
from pathokd.slides.manifest import TileSpec
from pathokd.slides.sources import SlideSource
from pathokd.slides.tile import cut_slide
from pathokd.types import Mpp

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""`auto` is bf16 on CUDA and fp32 elsewhere: few CPUs gain from bf16 and most lose."""

Settled = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Embedder:
    """A frozen model that turns images into one vector each.

    It normalises and resizes as the model's card says, or by the transform of a network from elsewhere; the weights
    stay fp32; bf16 and fp16 are autocast. The model is put in eval mode and moved to `device`.

    Args:
        model: An encoder, or what `load_encoder` takes: a card's name, `hf-hub:...` or an exported folder; or the name
            of an encoder that another package offers (see `pathokd.models.plugins`); or any torch module that returns
            one vector per image, with its `transform`.
        readout: How tokens become one vector; a card's `readout` names the published embedding.
        precision: Arithmetic of the forward pass.
        device: `auto` (CUDA if there is one, else the CPU) or any torch device. On a CPU under glibc,
            `pathokd.models.device.keep_freed_memory(device)`, called before as the command line does, makes this some
            10 % faster.
        batch_size: Most images in one forward pass, at least 1.
        compile: Compile the model by torch for exactly `batch_size` images (fewer are filled up); takes a minute once.
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
        compile: bool = False,
        transform: Transform | None = None,
    ) -> None:
        if readout not in READOUTS:
            raise ValueError(f"readout should be one of {', '.join(READOUTS)}, got {readout!r}.")
        if precision not in get_args(Precision):
            raise ValueError(f"precision should be one of {', '.join(get_args(Precision))}, got {precision!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}.")
        self.device = choose_device(device)
        encoder = as_encoder(model, transform)
        if isinstance(encoder, VectorEncoder) and readout != "cls":
            raise ValueError(
                f"readout chooses among tokens, and {encoder.card.name} returns one vector per image: leave it out."
            )
        self.encoder: Encoder | VectorEncoder = encoder.eval().to(self.device)
        self.readout: Readout = readout
        self.precision: Settled = _settle(precision, self.device)
        self.batch_size = batch_size
        self.compiled, self._rows = compile, batch_size if compile else None
        run: Callable[[Tensor], Any] = encoder.encode if isinstance(encoder, Encoder) else encoder
        self._values = _pixel_table(encoder, self.device)
        self._run = torch.compile(run, dynamic=False) if compile else run

    @cached_property
    def dim(self) -> int:
        """Length of one vector; a network from elsewhere is run on a white picture to learn it."""
        if isinstance(self.encoder, Encoder):
            return readout_dim(self.encoder.embed_dim, self.readout)
        side = self.encoder.card.image_px
        return int(self._vectors(self._pixels(np.full((1, side, side, 3), 255, np.uint8)), 1).shape[1])

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
        vectors = list(self.stream(in_batches(images, self.batch_size), Spent()))
        return np.concatenate(vectors) if vectors else np.empty((0, self.dim), np.float32)

    def stream(self, batches: Iterable[Batch], spent: Spent) -> Iterator[npt.NDArray[np.float32]]:
        """Embed batch after batch, each as one forward pass.

        The next batch is sent to the device before the vectors of the last one are fetched, so that a GPU does not wait
        while the host prepares.

        Args:
            batches: Images of one size each, at most `batch_size`.
            spent: Gets the seconds spent on preprocessing and encoding.

        Yields:
            Float32, shape (n, dim), for each batch in turn.
        """
        before: _OnItsWay | None = None
        for images in batches:
            started = time.perf_counter()
            pixels = self._pixels(images)
            started = spent.lap("preprocess_s", started)
            sent = _send_back(self._vectors(pixels, len(images)))
            spent.lap("encode_s", started)
            if before is not None:
                yield before.wait(spent)
            before = sent
        if before is not None:
            yield before.wait(spent)

    def tokens(self, images: Images) -> npt.NDArray[np.float32]:
        """Patch tokens of images of one size, as grids.

        Args:
            images: See `Images`.

        Returns:
            Float32, shape (n, rows, columns, width of a token); row by row as the patches lie in the image.

        Raises:
            ValueError: No image, images of several sizes, or one that is not uint8 RGB.
        """
        batches = [self.features(np.stack(batch)) for batch in in_batches(images, self.batch_size)]
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
        spec = TileSpec(
            (card.mpp or 0.5) if mpp is None else mpp,
            card.image_px if tile_px is None else tile_px,
            stride_px,
            min_tissue,
        )
        for sentence in mismatches(card, spec):
            warnings.warn(sentence, stacklevel=2)
        source = SlideSource(Path(path).stem, Path(path).absolute(), mpp_else=mpp_level0)
        with source.open() as slide, Bars() as bars:
            tiles = cut_slide(slide, source, spec).kept
            if tiles.empty:
                raise SlideError(f"{path} holds no tile with {min_tissue:.0%} tissue: look at it, or lower min_tissue.")
            reading = Reading(self.batch_size, workers)
            features, flags = embed_tiles(self.stream, self.dim, slide, tiles, spec, reading, bars, Spent())
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
                    "features": model_attrs(self.facts, source.slide_id, header, slide),
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
        return self._tokens(self._pixels(images), len(images))

    def _pixels(self, images: Batch) -> Tensor:
        """One batch on the device, as the model takes it."""
        if not isinstance(self.encoder, Encoder):
            return self.encoder.prepare(images).to(self.device)
        if self._values is not None and self.encoder.takes_as_is(*images[0].shape[:2]):
            return look_up(images, self._values, self._rows)
        with torch.inference_mode():
            return self.encoder.preprocess(to_device(images, self.device, self._rows))

    def _vectors(self, pixels: Tensor, n: int) -> Tensor:
        """Vectors of the first `n` rows of a forward pass, fp32."""
        if isinstance(self.encoder, Encoder):
            return read_out(self._tokens(pixels, n), self.readout)
        vectors: Tensor = self._forward(pixels)
        return vectors[:n].float()

    def _tokens(self, pixels: Tensor, n: int) -> Features:
        """The first `n` rows of a forward pass, fp32."""
        out: Features = self._forward(pixels)
        return Features(out.cls[:n].float(), out.patches[:n].float(), out.grid)

    def _forward(self, pixels: Tensor) -> Any:
        """The model's forward pass, in the embedder's precision."""
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, _AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST),
        ):
            return self._run(pixels)


class _OnItsWay(NamedTuple):
    """Vectors that a device may still be computing."""

    host: Tensor
    arrived: torch.cuda.Event | None

    def wait(self, spent: Spent) -> npt.NDArray[np.float32]:
        started = time.perf_counter()
        if self.arrived is not None:
            self.arrived.synchronize()
        spent.lap("encode_s", started)
        return np.asarray(self.host.numpy(), np.float32)


def _send_back(vectors: Tensor) -> _OnItsWay:
    """Start copying vectors to the host; queued behind their own batch, not behind the next one."""
    if vectors.device.type != "cuda":
        return _OnItsWay(vectors.cpu(), None)
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(vectors.device))
    return _OnItsWay(host, arrived)


def _pixel_table(encoder: Encoder | VectorEncoder, device: torch.device) -> npt.NDArray[np.float32] | None:
    """What each pixel value becomes, where looking it up is the fastest way: fp32 weights on the CPU."""
    if not isinstance(encoder, Encoder) or device.type != "cpu" or encoder.dtype != torch.float32:
        return None
    return encoder.pixel_values().numpy()


def _settle(precision: Precision, device: torch.device) -> Settled:
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision
