"""pathokd distils pathology vision foundation models into small, robust students."""

import importlib
import os
from typing import Any

from pathokd._version import __version__

# albumentations asks a server for its newest version on import; nothing is fetched here unless a name says so.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

_PUBLIC = {
    "DistillationModule": "pathokd.distill.module",
    "Embedder": "pathokd.embed.embedder",
    "Encoder": "pathokd.models.encoder",
    "Features": "pathokd.models.features",
    "ModelCard": "pathokd.models.cards",
    "Objective": "pathokd.distill.objective",
    "PackedTiles": "pathokd.data.packed",
    "PathokdError": "pathokd.errors",
    "Slide": "pathokd.slides.slide",
    "TileDataModule": "pathokd.data.datamodule",
    "TileManifest": "pathokd.slides.manifest",
    "TileSpec": "pathokd.slides.manifest",
    "export_student": "pathokd.export.checkpoint",
    "get_card": "pathokd.models.zoo",
    "load_encoder": "pathokd.models.encoder",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import pathokd` loads neither torch nor Lightning."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pathokd' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
