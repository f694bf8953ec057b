"""Encoders by name, also those that other packages offer: entry points of the group `pathokd.encoders`.

A package says, in its pyproject.toml,

    [project.entry-points."pathokd.encoders"]
    my_encoder = "my_package:my_encoder"

where `my_encoder()` returns (module, transform), as `VectorEncoder` takes them, or a `pathokd.Encoder`. Nothing of
another package is imported unless its encoder is asked for.
"""

import importlib.metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from torch import nn

from pathokd.errors import WeightsError
from pathokd.models.encoder import load_encoder
from pathokd.models.outside import Transform, VectorEncoder
from pathokd.models.vit import Encoder
from pathokd.models.zoo import card_names, get_card

GROUP = "pathokd.encoders"


def plugins() -> list[EntryPoint]:
    """What installed packages offer, by name."""
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)


def package(point: EntryPoint) -> str:
    """Name and version of the package an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def collision(point: EntryPoint) -> str:
    """Why a name cannot be used, one sentence; empty if it can."""
    if point.name in card_names():
        return (
            f"{point.name!r} is a model card of pathokd and an encoder of {package(point)}: uninstall that package, or "
            "have the encoder renamed."
        )
    others = [other for other in plugins() if other.name == point.name and other != point]
    if others:
        return (
            f"{point.name!r} is an encoder of {package(point)} and of {package(others[0])}: uninstall one of them, or "
            "have the encoder renamed."
        )
    return ""


def open_model(name_or_path: str | Path) -> Encoder | VectorEncoder:
    """A model by name: of an encoder that another package offers, or whatever `load_encoder` takes.

    Raises:
        ValueError: Nobody knows the name.
        WeightsError: The name is taken twice; the package fails, or returns something else; or weights are missing,
            gated or damaged.
    """
    name = str(name_or_path)
    offered = plugins()
    for point in offered:
        if point.name == name:
            if trouble := collision(point):
                raise WeightsError(trouble)
            return _load(point)
    bare = not any(sign in name for sign in "/\\:") and not Path(name).exists()
    if offered and bare and name not in card_names():
        try:
            get_card(name)
        except ValueError as error:
            raise ValueError(f"{error} Encoders of other packages: {', '.join(p.name for p in offered)}.") from None
    return load_encoder(name_or_path)


def as_encoder(
    model: Encoder | VectorEncoder | nn.Module | str, transform: Transform | None
) -> Encoder | VectorEncoder:
    """What an embedder runs, from anything that stands for a model.

    Raises:
        ValueError: A transform is missing for a plain module, or given for a model that brings its own.
        TypeError: `model` is no model.
        WeightsError: As `open_model`.
    """
    own = isinstance(model, str | Encoder | VectorEncoder)
    if own and transform is not None:
        raise ValueError(
            "transform is for a plain torch module; this model brings its own preprocessing: leave it out."
        )
    if isinstance(model, str):
        return open_model(model)
    if isinstance(model, Encoder | VectorEncoder):
        return model
    if isinstance(model, nn.Module) and transform is None:
        raise ValueError(
            f"{type(model).__name__} does not say how it wants its input: pass transform=, from a PIL picture to a "
            "normalised tensor."
        )
    return VectorEncoder(model, transform)


def _load(point: EntryPoint) -> Encoder | VectorEncoder:
    where = f"The encoder {point.name!r} of {package(point)}"
    try:
        made: Any = point.load()()
    except Exception as error:
        raise WeightsError(f"{where} ({point.value}) fails with {type(error).__name__}: {error}") from error
    if isinstance(made, Encoder | VectorEncoder):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1]):
        return VectorEncoder(made[0], made[1], point.name)
    got = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
    raise WeightsError(f"{where} ({point.value}) should return (module, transform) or a pathokd.Encoder, got {got}.")
