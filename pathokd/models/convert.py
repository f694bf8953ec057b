"""Weights of transformers' `Dinov2Model` under timm's names, so that transformers itself is not needed."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pathokd.errors import WeightsError

# Left: transformers, right: timm. Inside a block both are relative to it.
_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_INNER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    # SwiGLU: both hold the gate in the first half of the packed matrix.
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_IGNORED = ("embeddings.mask_token",)
_QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")


def convert_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `Dinov2Model` or `Dinov2WithRegistersModel` to those of timm's vision
    transformer.

    Query, key and value are stacked into timm's `qkv`. The mask token, which no inference uses, is left out.
    A position embedding that also holds the class token's place stays as it is: `weights.fit_state_dict`
    folds it where the timm model keeps none.

    Args:
        state: weights as transformers saves them, with or without the `dinov2.` prefix.

    Returns:
        The same weights under timm's names.

    Raises:
        WeightsError: a name that is not part of that model.
    """
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, value in state.items():
        key = re.sub(r"^(dinov2|model|dinov2_with_registers)\.", "", full)
        if key in _IGNORED:
            continue
        block = re.match(r"encoder\.layer\.(\d+)\.(.+)$", key)
        if key in _OUTER:
            result[_OUTER[key]] = value
        elif block is None:
            raise WeightsError(f"{full} is no weight of a transformers Dinov2Model: pass the card of the right model.")
        elif qkv := _QKV.fullmatch(block[2]):
            parts.setdefault(f"blocks.{block[1]}.attn.qkv.{qkv[2]}", {})[qkv[1]] = value
        else:
            result[f"blocks.{block[1]}.{_inner(block[2], full)}"] = value
    for name, three in parts.items():
        if len(three) != 3:
            raise WeightsError(
                f"{name} needs query, key and value, found {', '.join(three)}: download the weights again."
            )
        result[name] = torch.cat([three["query"], three["key"], three["value"]])
    return result


def _inner(name: str, full: str) -> str:
    if name in _INNER:
        return _INNER[name]
    stem, _, kind = name.rpartition(".")
    if stem not in _INNER:
        raise WeightsError(f"{full} is no weight of a transformers Dinov2Model: pass the card of the right model.")
    return f"{_INNER[stem]}.{kind}"
