"""The product of a run: one folder that plain timm and pathokd load alike."""

import contextlib
import copy
import dataclasses
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from pathokd._version import __version__
from pathokd.errors import StoreError, WeightsError
from pathokd.export.card import render_card
from pathokd.files import write_json, write_text
from pathokd.models.build import is_dynamic, plain_timm_config
from pathokd.models.encoder import Encoder
from pathokd.models.projector import Projector
from pathokd.models.standardize import Standardizer
from pathokd.models.weights import read_safetensors, state_sha256

TOLERANCE = 1e-5


def export_student(
    encoder: Encoder,
    out_dir: str | Path,
    *,
    adaptors: Mapping[str, nn.Module] | None = None,
    facts: Mapping[str, Any] | None = None,
    licence: str | None = None,
    name: str | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an encoder as a folder: weights, timm hub config, adaptor heads, and a card to read.

    Everything goes to a temporary folder beside `out_dir` first. There, plain timm loads it back and must
    return the same class token as the encoder, to 1e-5; only then is the folder renamed.

    Args:
        encoder: the student (or its EMA), on any device.
        out_dir: folder to make.
        adaptors: `Projector` or `Standardizer` modules by name, such as `embedded.cls`.
        facts: JSON-able; `teacher`, `data` and `metrics` appear in the card, everything is kept in
            config.json.
        licence: licence of the student; None takes the card's, which a student inherits from its teacher.
        name: the model's name; None takes the folder's.
        half: store fp16 weights, half the size; what is checked and hashed is the rounded model, as it will
            be loaded.
        overwrite: replace a folder that an earlier export wrote.

    Returns:
        The folder.

    Raises:
        TypeError: an adaptor of another kind.
        StoreError: the folder exists, the disk is full, or timm does not get the same numbers back.
    """
    target = Path(out_dir)
    _refuse_occupied(target, overwrite)
    licence_given = licence not in (None, "", encoder.card.licence)
    licence = licence or encoder.card.licence
    card = dataclasses.replace(encoder.card, name=name or target.name, licence=licence, source="", key_layout="timm")
    heads = {key: _head_spec(key, module) for key, module in (adaptors or {}).items()}
    if half:
        encoder = copy.deepcopy(encoder)
        encoder.model.half().float()
    dtype = torch.float16 if half else torch.float32
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in encoder.model.state_dict().items()}
    sha256 = state_sha256(state)
    config = _hub_config(encoder, dataclasses.asdict(card), dict(facts or {}), sha256)
    load_kwargs = _load_kwargs(config)
    with _staged(target) as folder:
        _save_tensors(state, folder / "model.safetensors")
        write_json(folder / "config.json", config)
        if adaptors:
            _save_adaptors(folder, adaptors, heads)
        text = render_card(
            card,
            licence=licence,
            facts=facts or {},
            sha256=sha256,
            version=__version__,
            adaptors=heads,
            load_kwargs=load_kwargs,
            licence_given=licence_given,
        )
        write_text(folder / "README.md", text)
        if not load_kwargs:
            _check_round_trip(encoder, folder)
    return target


def load_adaptors(folder: str | Path) -> dict[str, nn.Module]:
    """Load the heads of an exported folder.

    Args:
        folder: what `export_student` wrote; `local-dir:` in front is allowed.

    Returns:
        Modules by name, in eval mode; empty if the student was exported without any.

    Raises:
        WeightsError: no such folder, or its heads are damaged.
    """
    path = Path(str(folder).removeprefix("local-dir:"))
    if not path.is_dir():
        raise WeightsError(f"There is no folder {path}: give the folder of an exported student.")
    if not (path / "adaptors.json").is_file():
        return {}
    state = read_safetensors(path / "adaptors.safetensors")
    modules: dict[str, nn.Module] = {}
    try:
        specs = json.loads((path / "adaptors.json").read_text(encoding="utf-8"))
        for name, spec in specs.items():
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            module = _make_head(spec)
            module.load_state_dict(own)
            modules[name] = module.eval()
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"The adaptors of {path} are damaged ({error}): export the student again.") from error
    return modules


def _hub_config(encoder: Encoder, card: dict[str, Any], facts: dict[str, Any], sha256: str) -> dict[str, Any]:
    """config.json as timm's hub loader reads it, with everything else under `pathokd`."""
    own = encoder.card
    architecture, model_args = plain_timm_config(own.architecture, own.model_args, own.image_px)
    size = [3, own.image_px, own.image_px]
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": own.embed_dim,
        "global_pool": "token",
        "model_args": {"num_classes": 0, **model_args},
        "pretrained_cfg": {
            "tag": "pathokd",
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": not is_dynamic(encoder.model),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(own.mean),
            "std": list(own.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": card["licence"],
        },
        "pathokd": {
            "schema": "student/1",
            "version": __version__,
            "card": card,
            "teacher": facts.get("teacher"),
            "licence": card["licence"],
            "mpp": own.mpp,
            "readout": own.readout,
            "data": facts.get("data"),
            "metrics": facts.get("metrics", {}),
            "facts": facts,
            "weights_sha256": sha256,
        },
    }


def load_line(folder: str | Path) -> str:
    """The line of Python by which plain timm loads an exported folder."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return f'timm.create_model("local-dir:{folder}", pretrained=True{_load_kwargs(config)})'


def _load_kwargs(config: Mapping[str, Any]) -> str:
    """Arguments that plain timm cannot take from JSON, as text for the card; usually none."""
    layer = config["model_args"].get("mlp_layer")
    return "" if layer is None else f", mlp_layer=timm.layers.{layer}"


def _check_round_trip(encoder: Encoder, folder: Path) -> None:
    """Load the folder with plain timm and compare class tokens on one random tile."""
    reference = encoder.model.patch_embed.proj.weight
    pixels = torch.rand(1, 3, encoder.card.image_px, encoder.card.image_px, generator=torch.Generator().manual_seed(0))
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(reference.device)
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        inputs = encoder.preprocess(pixels.to(reference.device))
        ours = encoder.model.forward_features(inputs)[:, 0].float()
        theirs = again(inputs.float())
    encoder.train(was_training)
    # Half-precision weights are exported as the fp32 numbers they stand for; their own arithmetic is coarser.
    tolerance = TOLERANCE if reference.dtype == torch.float32 else 0.05
    gap = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
    if not gap <= tolerance:
        raise StoreError(
            f"The exported model does not give the student's class token back in timm {timm.__version__} "
            f"(largest relative difference {gap:.2g}, allowed {tolerance:g}): check its architecture and "
            f"model_args."
        )


def _head_spec(name: str, module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Projector):
        return {"type": "projector", **module.spec()}
    if isinstance(module, Standardizer):
        return {"type": "standardizer", "dim": module.dim, "eps": module.eps}
    raise TypeError(f"Adaptor {name!r} must be a Projector or a Standardizer, got {type(module).__name__}.")


def _make_head(spec: Mapping[str, Any]) -> nn.Module:
    arguments = {key: value for key, value in spec.items() if key != "type"}
    if spec["type"] == "projector":
        return Projector(**arguments)
    if spec["type"] == "standardizer":
        dim = arguments["dim"]
        return Standardizer(mean=torch.zeros(dim), std=torch.ones(dim), **arguments)
    raise ValueError(f"unknown adaptor type {spec['type']!r}")


def _save_adaptors(folder: Path, adaptors: Mapping[str, nn.Module], specs: Mapping[str, Any]) -> None:
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous().clone()
        for name, module in adaptors.items()
        for key, value in module.state_dict().items()
    }
    _save_tensors(tensors, folder / "adaptors.safetensors")
    write_json(folder / "adaptors.json", dict(specs))


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors makes files for their owner only; an export is to be shared, as its other files are."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not (target / "model.safetensors").is_file():
        raise StoreError(f"{target} exists and is not an exported student: choose another folder.")
    if not overwrite:
        raise StoreError(f"{target} holds an exported student already: pass --overwrite, or choose another folder.")


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `target` at the end, or vanishes."""
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    old = part.with_suffix(".old")
    try:
        part.mkdir(parents=True)
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"Cannot write {target}: {getattr(error, 'strerror', None) or error}. Free some space or choose another "
            "output folder; nothing half-written was left behind."
        ) from error
    finally:
        if old.exists() and not target.exists():  # the second rename failed, or never came
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
