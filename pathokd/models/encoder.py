"""From a name or a path to an encoder: which card, which weights, loaded strictly."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pathokd.errors import WeightsError
from pathokd.models.build import build_timm, image_size, patch_px
from pathokd.models.cards import ModelCard
from pathokd.models.convert import convert_dinov2
from pathokd.models.features import Readout
from pathokd.models.vit import Encoder
from pathokd.models.weights import (
    HUB,
    LOCAL,
    StateDict,
    drop_deep_blocks,
    fetch_hub_config,
    fetch_hub_weights,
    fit_state_dict,
    load_strictly,
    read_folder_config,
    read_folder_weights,
    read_safetensors,
)
from pathokd.models.zoo import card_names, get_card

Colour = tuple[float, float, float]

__all__ = ["Encoder", "build_loaded", "load_encoder", "make_card"]


def load_encoder(
    name_or_path: str | Path,
    *,
    pretrained: bool = True,
    image_px: int | None = None,
    card: str | ModelCard | None = None,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    mpp: float | None = None,
) -> Encoder:
    """Build an encoder and load its weights.

    Nothing is fetched unless the name, or its card's source, says `hf-hub:`.

    Args:
        name_or_path: a card's name (`hoptimus0`), `hf-hub:OWNER/NAME`, `local-dir:FOLDER` or a plain folder
            with `config.json` and `model.safetensors`, or a `.safetensors` file (which needs `card` or
            `architecture`).
        pretrained: False gives the same architecture with random weights, and reads or fetches no weights.
        image_px: another input side than the card's; the position embedding is resampled.
        card: a card, or its name, that describes the weights of a folder or file.
        architecture: timm name that describes the weights, in place of a card.
        model_args: arguments of the timm model, on top of the card's. A `depth` given here that is smaller
            than the file's drops exactly the weights `blocks.N.*` with N >= depth: the only case in which
            weights are left out.
        mean: per-channel mean of the input, in place of the card's (ImageNet's if there is no card).
        std: per-channel divisor of the input, likewise.
        mpp: microns per pixel, in place of the card's.

    Returns:
        The encoder, in fp32, in training mode like any new module.

    Raises:
        ValueError: an unknown name, architecture or argument.
        WeightsError: weights missing, gated, offline, damaged, or not of this architecture.
    """
    facts = {"mean": mean, "std": std, "mpp": mpp}
    found, read = _resolve(str(name_or_path), card, architecture)
    wanted = _specialise(
        found, image_px, model_args or {}, {key: value for key, value in facts.items() if value is not None}
    )
    if not pretrained:
        return Encoder(build_timm(wanted.architecture, wanted.model_args, image_px=wanted.image_px), wanted)
    state = read()
    if wanted.key_layout == "transformers" and "cls_token" not in state:
        state = convert_dinov2(state)
    if model_args and "depth" in model_args:
        state = drop_deep_blocks(state, wanted.depth)
    return Encoder(build_loaded(wanted, state, str(name_or_path)), wanted)


def build_loaded(card: ModelCard, state: StateDict, what: str) -> Any:
    """Build the card's timm model and fill it with `state`, without initialising weights that are then
    replaced.

    Raises:
        WeightsError: the weights do not fit.
    """
    model = build_timm(card.architecture, card.model_args, image_px=card.image_px, device="meta")
    if any(name not in model.state_dict() for name, _ in model.named_buffers()):
        # Buffers that are not saved (rotary tables) must be computed for real.
        model = build_timm(card.architecture, card.model_args, image_px=card.image_px)
    load_strictly(model, fit_state_dict(state, model), what)
    return model


def make_card(
    name: str,
    architecture: str,
    model_args: Mapping[str, Any],
    *,
    source: str = "",
    image_px: int | None = None,
    mpp: float | None = None,
    mean: Colour = IMAGENET_DEFAULT_MEAN,
    std: Colour = IMAGENET_DEFAULT_STD,
    readout: Readout = "cls",
    licence: str = "unknown",
) -> ModelCard:
    """Describe a model that has no card, by building its shapes on the meta device.

    Raises:
        ValueError: the architecture or its arguments are wrong, or the input is not square.
    """
    model = build_timm(architecture, model_args, image_px=image_px, device="meta")
    height, width = image_size(model)
    if height != width:
        raise ValueError(f"{name} is made for {height} x {width} px: pass a square img_size.")
    return ModelCard(
        name=name,
        source=source,
        architecture=architecture,
        model_args=dict(model_args),
        embed_dim=int(model.embed_dim),
        depth=len(model.blocks),
        patch_px=patch_px(model),
        num_prefix_tokens=int(model.num_prefix_tokens),
        image_px=height,
        mpp=mpp,
        mean=cast(Colour, tuple(mean)),
        std=cast(Colour, tuple(std)),
        readout=readout,
        licence=licence,
        gated=False,
        params=sum(parameter.numel() for parameter in model.parameters()),
    )


def _resolve(
    name: str, card: str | ModelCard | None, architecture: str | None
) -> tuple[ModelCard, Callable[[], StateDict]]:
    """The card a name stands for, and how its weights are read once they are needed."""
    given = get_card(card) if isinstance(card, str) else card
    if given is None and architecture is not None:
        given = make_card(Path(name).stem, architecture, {}, source=name)
    if name in card_names():
        known = given or get_card(name)
        return known, lambda: fetch_hub_weights(get_card(name).source)
    if name.startswith(HUB):
        return given or _hub_card(name), lambda: fetch_hub_weights(name)
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if name.startswith(LOCAL) or path.is_dir():
        return given or _folder_card(path), lambda: read_folder_weights(path)
    if path.suffix == ".safetensors":
        if given is None:
            raise ValueError(f"{path} says nothing about its architecture: pass card= or architecture= with it.")
        return given, lambda: read_safetensors(path)
    if path.exists():
        raise WeightsError(f"{path} is neither a folder nor a .safetensors file: convert the weights to safetensors.")
    if "/" in name or "\\" in name:
        raise WeightsError(f"There is no folder or file {name}: correct the path, or write hf-hub:{name} to fetch it.")
    try:
        return get_card(name), dict
    except ValueError as error:
        said = str(error)
        raise ValueError(f"There is no folder {name} here, and {said[:1].lower()}{said[1:]}") from error


def _hub_card(source: str) -> ModelCard:
    for known in map(get_card, card_names()):
        if known.source.lower() == source.lower():
            return known
    config, architecture, model_args = fetch_hub_config(source)
    return _config_card(source.rsplit("/", 1)[-1], source, architecture, model_args, config)


def _folder_card(folder: Path) -> ModelCard:
    config = read_folder_config(folder)
    exported = config.get("pathokd", {}).get("card")
    try:
        if exported is not None:
            colour = {key: tuple(exported[key]) for key in ("mean", "std")}
            return ModelCard(**{**exported, **colour, "source": f"{LOCAL}{folder}"})
        architecture, args, cfg = (
            config["architecture"],
            config.get("model_args", {}),
            config.get("pretrained_cfg", {}),
        )
        return _config_card(folder.name, f"{LOCAL}{folder}", architecture, args, cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder}/config.json does not describe a model pathokd can build ({error}): pass card= or architecture=."
        ) from error


def _config_card(
    name: str, source: str, architecture: str, model_args: Mapping[str, Any], config: Mapping[str, Any]
) -> ModelCard:
    """A card from a timm hub config, without `num_classes` and `global_pool`, which are pathokd's to set."""
    args = {key: value for key, value in model_args.items() if key not in ("num_classes", "global_pool")}
    size = config.get("input_size")
    return make_card(
        name,
        architecture,
        args,
        source=source,
        image_px=None if "img_size" in args or not size else int(size[-1]),
        mean=tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        std=tuple(config.get("std", IMAGENET_DEFAULT_STD)),
        licence=str(config.get("license", "unknown")),
    )


def _specialise(
    card: ModelCard, image_px: int | None, model_args: Mapping[str, Any], facts: Mapping[str, Any]
) -> ModelCard:
    """The card with the caller's wishes applied; sizes and the parameter count come from the new shapes."""
    facts = {key: tuple(value) if key in ("mean", "std") else value for key, value in facts.items()}
    card = dataclasses.replace(card, **facts)
    args = {**card.model_args, **model_args}
    side = image_px or (None if "img_size" in model_args else card.image_px)
    if args == card.model_args and side == card.image_px:
        return card
    fresh = make_card(card.name, card.architecture, args, image_px=side)
    shapes = ("model_args", "embed_dim", "depth", "patch_px", "num_prefix_tokens", "image_px", "params")
    return dataclasses.replace(card, **{key: getattr(fresh, key) for key in shapes})
