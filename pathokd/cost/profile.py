"""What a model costs: parameters, arithmetic per tile, tiles per second on this machine."""

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pathokd.models.build import build_timm, is_dynamic
from pathokd.models.cards import ModelCard
from pathokd.models.encoder import Encoder

Clock = Callable[[], float]


class ModelCost(NamedTuple):
    """`gflops` is for one tile, two operations per multiply-accumulate; `tiles_per_s` was measured here."""

    params: int
    gflops: float
    tiles_per_s: float


def count_params(model: nn.Module) -> int:
    """Number of parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(encoder: Encoder | ModelCard, *, image_px: int | None = None) -> float:
    """GFLOP of one forward pass on one tile, 2 per multiply-accumulate.

    Matrix products, convolutions and attention are counted; norms, activations and additions (under 1 %) are
    not. The model is rebuilt on the meta device, so that nothing is computed.

    Args:
        encoder: the model, or its card: its weights do not matter.
        image_px: input side; None takes the card's.

    Returns:
        GFLOP per tile.

    Raises:
        ValueError: a size the model cannot take.
    """
    card = encoder if isinstance(encoder, ModelCard) else encoder.card
    side = image_px or card.image_px
    model = build_timm(card.architecture, card.model_args, image_px=side, device="meta").eval()
    model.requires_grad_(False)  # the counter trips over CaiT's class token, a view of a parameter
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward_features(torch.empty(1, 3, side, side, device="meta"))
    return float(counter.get_total_flops()) / 1e9


def seen_px(card: ModelCard, image_px: int) -> int:
    """Side at which a model sees a tile of `image_px`: the same if it takes any size, else its own.

    Whether it does is asked of the model itself, as some architectures do without being told to (DINOv3).
    """
    args = json.dumps(card.model_args, sort_keys=True)
    return image_px if _takes_any_size(card.architecture, args, card.image_px) else card.image_px


@functools.lru_cache(maxsize=64)  # a run asks for each view, and a ViT-g takes a quarter of a second to build
def _takes_any_size(architecture: str, model_args: str, image_px: int) -> bool:
    return is_dynamic(build_timm(architecture, json.loads(model_args), image_px=image_px, device="meta"))


def measure_tiles_per_s(
    forward: Callable[[Tensor], object],
    images: Tensor,
    *,
    seconds: float,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> float:
    """Tiles per second: batch size over the median time of a batch.

    Args:
        forward: what is timed; called with `images`.
        images: one batch, on the device that is measured.
        seconds: measure for at least this long, and at least three batches.
        warmup: batches before the measurement starts.
        clock: seconds; an argument so that tests need not wait.

    Returns:
        Tiles per second.

    Raises:
        ValueError: negative `seconds` or `warmup`.
    """
    if seconds < 0 or warmup < 0:
        raise ValueError(f"seconds and warmup must not be negative, got {seconds} and {warmup}.")
    for _ in range(warmup):
        forward(images)
    _wait(images.device)
    times: list[float] = []
    start = clock()
    while len(times) < 3 or clock() - start < seconds:
        begin = clock()
        forward(images)
        _wait(images.device)
        times.append(clock() - begin)
    return images.shape[0] / max(statistics.median(times), 1e-9)


def profile_model(
    encoder: Encoder, *, image_px: int | None = None, batch_size: int = 8, seconds: float = 2.0
) -> ModelCost:
    """Cost of an encoder where it is now: its device, its precision.

    The time covers what an encoder does with uint8 tiles already on its device, normalisation included.

    Args:
        encoder: the model; it is put back into the mode it was in.
        image_px: side of the tiles; None takes the card's.
        batch_size: tiles per forward pass.
        seconds: time to measure for.

    Returns:
        Parameters, GFLOP per tile, tiles per second.

    Raises:
        ValueError: a batch below 1, or a size the model cannot take.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    side = image_px or encoder.card.image_px
    device = encoder.model.patch_embed.proj.weight.device
    images = torch.randint(
        0, 256, (batch_size, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).to(device)
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        speed = measure_tiles_per_s(encoder, images, seconds=seconds)
    encoder.train(was_training)
    return ModelCost(count_params(encoder), count_gflops(encoder, image_px=seen_px(encoder.card, side)), speed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
