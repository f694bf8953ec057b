"""From an architecture's name and plain arguments to a timm vision transformer, and back to timm's config."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm import layers as timm_layers
from timm.layers.create_act import get_act_layer

DEFAULT_ARCHITECTURE = "vit_base_patch14_reg4_dinov2"
SWIGLU_ARGS: dict[str, Any] = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 5.33334}
"""H0-mini's feed-forward: SiLU-gated, packed in one matrix. 5.33334 = 2 * 2.66667, both halves counted."""

MLP_LAYERS: tuple[str, ...] = ("Mlp", "SwiGLUPacked", "SwiGLU", "GluMlp", "GatedMlp")

# A timm model that has SwiGLUPacked built in. timm resolves strings for act_layer but not for mlp_layer, so
# a JSON config can only ask for SwiGLUPacked by naming an architecture that has it and overriding all of its
# sizes.
SWIGLU_HOST = "vit_giant_patch14_reg4_dinov2"


def resolve_model_args(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the names of layers by timm's classes, leaving everything else as it is.

    Args:
        model_args: JSON-able keyword arguments; `mlp_layer` is one of `MLP_LAYERS`, `act_layer` any
            activation timm knows by name (`gelu`, `silu`; case does not matter).

    Returns:
        Keyword arguments for `timm.create_model`.

    Raises:
        ValueError: an unknown layer name.
    """
    resolved = dict(model_args)
    mlp = resolved.get("mlp_layer")
    if isinstance(mlp, str):
        if mlp not in MLP_LAYERS:
            raise ValueError(f"mlp_layer must be one of {', '.join(MLP_LAYERS)}, got {mlp!r}.")
        resolved["mlp_layer"] = getattr(timm_layers, mlp)
    act = resolved.get("act_layer")
    if isinstance(act, str):
        try:
            resolved["act_layer"] = get_act_layer(act.lower())
        except (KeyError, AssertionError) as error:
            raise ValueError(
                f"act_layer must be an activation timm knows, such as gelu or silu, got {act!r}."
            ) from error
    return resolved


def build_timm(
    architecture: str,
    model_args: Mapping[str, Any],
    *,
    image_px: int | None = None,
    device: str | None = None,
) -> Any:
    """Build a headless timm vision transformer with random weights.

    `global_pool="token"` and `num_classes=0` are always passed, so that the final norm is applied to every
    token and timm's own pooled output is the class token, whatever the architecture's default is.

    Args:
        architecture: timm name.
        model_args: JSON-able keyword arguments, see `resolve_model_args`.
        image_px: input side; wins over `img_size` in `model_args`.
        device: `meta` builds shapes only, in no time and memory.

    Returns:
        The timm model, which has a class token, registers or not, and patch tokens.

    Raises:
        ValueError: no such architecture, an argument it does not take, or a model that is not such a
            transformer.
    """
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models("*vit*"), n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else "choose one of timm.list_models('*vit*')."
        raise ValueError(f"timm {timm.__version__} has no model {architecture!r}: {hint}")
    kwargs = {**resolve_model_args(model_args), "num_classes": 0, "global_pool": "token"}
    if kwargs.get("in_chans", 3) != 3:
        raise ValueError(f"tiles are RGB: in_chans must be 3, got {kwargs['in_chans']}; leave it out.")
    if image_px is not None:
        kwargs["img_size"] = image_px
    try:
        with torch.device(device or "cpu"):
            model: Any = timm.create_model(architecture, pretrained=False, **kwargs)
    except (TypeError, AssertionError, ZeroDivisionError, RuntimeError) as error:  # the last: no such pretrained tag
        raise ValueError(f"timm cannot build {architecture} with {dict(model_args)}: {error}.") from error
    _check_tokens(model, architecture)
    return model


def _check_tokens(model: Any, architecture: str) -> None:
    """Only a transformer whose token 0 is the class token can be read without guessing."""
    has_blocks = hasattr(model, "blocks") and hasattr(model, "patch_embed") and hasattr(model, "forward_features")
    if not has_blocks or getattr(model, "cls_token", None) is None or getattr(model, "num_prefix_tokens", 0) < 1:
        raise ValueError(
            f"{architecture} is not a vision transformer with a class token: choose a timm vit_* or eva02_* model."
        )


def patch_px(model: Any) -> int:
    """Side of a patch in pixels.

    Raises:
        ValueError: the patches are not square.
    """
    height, width = model.patch_embed.patch_size
    if height != width:
        raise ValueError(f"pathokd needs square patches, this model has {height} x {width}.")
    return int(height)


def is_dynamic(model: Any) -> bool:
    """Whether the model takes any input whose sides are multiples of the patch."""
    return bool(getattr(model, "dynamic_img_size", False))


def image_size(model: Any) -> tuple[int, int]:
    """(height, width) in pixels the position embedding was made for."""
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def plain_timm_config(architecture: str, model_args: Mapping[str, Any], image_px: int) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments from which *plain* timm rebuilds the same model out of a JSON file.

    timm (1.0.31) does not look up `mlp_layer` by name. A SwiGLUPacked model is therefore written as
    `vit_giant_patch14_reg4_dinov2`, which has that layer built in, with every size overridden: same modules,
    same weight names. Other `mlp_layer` values stay in the arguments as a string that only pathokd resolves.

    Returns:
        (architecture, model_args), JSON-able, with `img_size` and `global_pool` set.
    """
    plain = {**model_args, "img_size": image_px, "global_pool": "token"}
    if plain.get("mlp_layer") == "Mlp":
        del plain["mlp_layer"]
    if plain.get("mlp_layer") != "SwiGLUPacked":
        return architecture, plain
    del plain["mlp_layer"]
    model = build_timm(architecture, model_args, image_px=image_px, device="meta")
    return SWIGLU_HOST, {**_vit_sizes(model), **plain}


def _vit_sizes(model: Any) -> dict[str, Any]:
    """The sizes of a VisionTransformer as timm's arguments, read from the model itself."""
    block = model.blocks[0]
    scale = getattr(block.ls1, "gamma", None)
    return {
        "patch_size": patch_px(model),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, model.embed_dim),
        "act_layer": type(block.mlp.act).__name__.lower(),
        "qkv_bias": block.attn.qkv.bias is not None,
        # The value itself is overwritten by the weights; None means that there is no LayerScale.
        "init_values": None if scale is None else 1e-5,
    }


def _ratio(hidden: int, width: int) -> float:
    """A ratio from which timm's int(width * ratio) gives `hidden` back, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
