"""What this machine can do: read slides, run models, and which published weights it has or may fetch."""

import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import constants, get_token, try_to_load_from_cache

from pathokd.errors import PathokdError
from pathokd.models import ModelCard, card_names, get_card
from pathokd.models.plugins import collision, package, plugins
from pathokd.models.weights import HUB
from pathokd.phantom import write_pyramid
from pathokd.processes import usable_cores
from pathokd.slides.slide import Slide

PACKAGES = ("pathokd", "torch", "torchvision", "timm", "lightning", "openslide-python", "openslide-bin", "tifffile")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Finding(NamedTuple):
    """One line of a report."""

    topic: str
    fine: bool
    """Whether it works; something that is merely absent, such as a GPU, is fine."""
    text: str


def examine() -> list[Finding]:
    """Look at versions, readers, devices and weights. Nothing is fetched."""
    return [*_versions(), _reader(), *_devices(), *(_weights(get_card(name)) for name in card_names()), *_plugins()]


def _versions() -> list[Finding]:
    found = [Finding("versions", True, f"Python {platform.python_version()} on {platform.platform()}")]
    for name in PACKAGES:
        try:
            found.append(Finding("versions", True, f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("versions", False, f"{name} is not installed: pip install {name}"))
    return found


def _reader() -> Finding:
    """Write a small pyramid and read it back, through OpenSlide."""
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Slide(write_pyramid(Path(folder) / "test.tif", image, 0.5)) as slide:
                tile = slide.read_tile(10, 10, mpp=0.5, tile_px=224)
        except (PathokdError, OSError) as error:
            return Finding("reading", False, f"A tiled TIFF cannot be read: {error}")
    return Finding("reading", True, f"A tiled TIFF is read by {slide.vendor}: {tile.shape[0]} px at {slide.mpp} um/px")


def _devices() -> list[Finding]:
    cores = usable_cores()
    found = [Finding("devices", True, f"CPU, {cores} cores, {torch.get_num_threads()} threads for torch")]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append(Finding("devices", True, f"CUDA {number}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        found.append(Finding("devices", True, "MPS"))
    if len(found) == 1:
        found.append(Finding("devices", True, "no GPU: embedding runs on the CPU"))
    return found


def _plugins() -> list[Finding]:
    """Encoders that other packages offer; none of them is imported."""
    return [
        Finding("encoders of other packages", not trouble, trouble or f"{point.name}: {package(point)}")
        for point in plugins()
        for trouble in [collision(point)]
    ]


def _weights(card: ModelCard) -> Finding:
    """Whether the weights of a card are here, and what stands between us and them if not."""
    repository = card.source.removeprefix(HUB)
    here = any(isinstance(try_to_load_from_cache(repository, name), str) for name in WEIGHT_FILES)
    if here:
        state = "weights in the local cache"
    elif constants.HF_HUB_OFFLINE:
        state = "not here, and HF_HUB_OFFLINE forbids fetching"
    elif card.gated and get_token() is None:
        state = "not here; gated: request access on its page, then `huggingface-cli login`"
    elif card.gated:
        state = "not here; gated: fetched with your login if access was granted"
    else:
        state = "not here; fetched when asked for"
    return Finding("weights", True, f"{card.name}: {card.params / 1e6:,.0f} M parameters, {card.licence}; {state}")
