"""Weights on disk and on the hub: found, read, fitted to a model, loaded strictly, and hashed."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from torch import Tensor

from pathokd.errors import WeightsError

StateDict = dict[str, Tensor]
HUB = "hf-hub:"
LOCAL = "local-dir:"


def read_safetensors(path: str | Path) -> StateDict:
    """Read a `.safetensors` file.

    Raises:
        WeightsError: the file is missing or is not a safetensors file.
    """
    if not Path(path).is_file():
        raise WeightsError(f"There is no weights file {path}: give the path of a .safetensors file.")
    try:
        state: StateDict = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors ({error}): download or export it again.") from error
    return state


def read_folder_weights(folder: Path) -> StateDict:
    """Read `model.safetensors` of a folder.

    Raises:
        WeightsError: no such file in it, or it is damaged.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise WeightsError(f"{folder} holds no model.safetensors: give a folder that pathokd exported or timm saved.")
    return read_safetensors(path)


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Read the timm hub `config.json` of a folder.

    Raises:
        WeightsError: no such folder or file, or it is not a timm config.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{folder} holds no config.json: give a folder with config.json and model.safetensors, "
            "or a .safetensors file together with its card or architecture."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): export or download the folder again.") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise WeightsError(
            f"{path} names no timm architecture: pass card= or architecture= to say what the weights are."
        )
    return config


def fetch_hub_weights(source: str) -> StateDict:
    """Download the weights of a `hf-hub:` source, or take them from the local cache.

    safetensors are preferred; a repository with only `pytorch_model.bin` is read with `weights_only=True`.

    Raises:
        WeightsError: gated, offline, or no such repository; the message says what to do.
    """
    model_id = source.removeprefix(HUB)
    try:
        state: StateDict = load_state_dict_from_hf(model_id, weights_only=True)
    except (
        hub_errors.HfHubHTTPError,
        hub_errors.HFValidationError,
        hub_errors.LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise hub_error(source, error) from error
    return state


def fetch_hub_config(source: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Download the timm config of a `hf-hub:` source: (pretrained_cfg, architecture, model_args).

    Raises:
        WeightsError: gated, offline, no such repository, or not a timm model.
    """
    model_id = source.removeprefix(HUB)
    try:
        config, architecture, model_args = load_model_config_from_hf(model_id)
    except (
        hub_errors.HfHubHTTPError,
        hub_errors.HFValidationError,
        hub_errors.LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise hub_error(source, error) from error
    except KeyError as error:
        raise WeightsError(
            f"{source} is not a timm model (its config.json lacks {error}): use a card or a local file."
        ) from error
    return dict(config), str(architecture), dict(model_args or {})


def hub_error(source: str, error: Exception) -> WeightsError:
    """Say what kept a download from happening, and what to do about it."""
    page = f"https://huggingface.co/{source.removeprefix(HUB)}"
    local = "or give a local folder or .safetensors path instead"
    if isinstance(error, hub_errors.GatedRepoError):
        return WeightsError(f"{source} is gated: request access at {page}, then run `huggingface-cli login`, {local}.")
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return WeightsError(
            f"{source} does not exist or needs a login: check the name at {page}, run `huggingface-cli login`, {local}."
        )
    if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(error, hub_errors.LocalEntryNotFoundError):
        return WeightsError(f"{source} holds no file that timm can load: look at {page}, {local}.")
    if isinstance(error, hub_errors.HFValidationError):
        return WeightsError(f"{source} is not a repository name of the form hf-hub:OWNER/NAME: correct it, {local}.")
    return WeightsError(
        f"{source} could not be fetched ({type(error).__name__}): go online and, if the model is gated, "
        f"request access "
        f"at {page} and run `huggingface-cli login`, {local}."
    )


def fit_state_dict(state: Mapping[str, Tensor], model: Any) -> StateDict:
    """Make a timm state dict fit a model of another input size, in fp32.

    Floating-point weights become fp32. A position embedding of another grid is resampled (bicubic,
    antialiased, as timm does). A position for the class token, when the model holds none, is folded into the
    class token. A classifier is dropped, since encoders have none. A position embedding that is no square grid
    after the model's prefix tokens stays as it is, for `load_strictly` to name.
    """
    fitted = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    fitted = {key: value for key, value in fitted.items() if key not in ("head.weight", "head.bias", "mask_token")}
    own = getattr(model, "pos_embed", None)
    if own is None or "pos_embed" not in fitted or fitted["pos_embed"].shape == own.shape:
        return fitted
    if fitted["pos_embed"].ndim != 3:
        return fitted
    position = fitted["pos_embed"]
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    if prefix == 0 and _is_square(position.shape[1] - 1):
        # DINOv2 with registers: the class token owns a position, the registers do not.
        fitted["cls_token"] = fitted["cls_token"] + position[:, :1]
        position = position[:, 1:]
    grid = model.patch_embed.grid_size
    same_width, square = position.shape[2] == own.shape[2], _is_square(position.shape[1] - prefix)
    if same_width and square and position.shape[1] != own.shape[1]:
        position = resample_abs_pos_embed(position, new_size=list(grid), num_prefix_tokens=prefix)
    fitted["pos_embed"] = position
    return fitted


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def drop_deep_blocks(state: Mapping[str, Tensor], depth: int) -> StateDict:
    """Leave out `blocks.N.*` with N >= depth, and nothing else."""
    return {key: value for key, value in state.items() if (block := _block_of(key)) is None or block < depth}


def _block_of(key: str) -> int | None:
    match = re.match(r"blocks\.(\d+)\.", key)
    return int(match.group(1)) if match else None


def load_strictly(model: Any, state: Mapping[str, Tensor], what: str) -> None:
    """Put `state` into `model`; every key and shape must match.

    The tensors are taken over as they are (`assign`), so that a model on the meta device comes to life.

    Raises:
        WeightsError: names the first keys that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise WeightsError(
            f"The weights of {what} do not fit the architecture: {'; '.join(faults)}. "
            "Check the architecture and model_args (depth, mlp_layer, reg_tokens, init_values)."
        )
    model.load_state_dict(dict(state), strict=True, assign=True)


def state_sha256(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names; the same on every device.

    Args:
        state: weights.
        dtype: hash floating-point weights as if they were of this type; None takes them as they are.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        digest.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
