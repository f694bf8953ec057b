"""The model that learns: built from scratch, from timm's weights, or out of the teacher's own layers."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import errors as hub_errors
from torch import Tensor

from pathokd.errors import WeightsError
from pathokd.models.build import DEFAULT_ARCHITECTURE, SWIGLU_ARGS, build_timm, resolve_model_args
from pathokd.models.cards import ModelCard
from pathokd.models.convert import convert_dinov2
from pathokd.models.encoder import build_loaded, load_encoder, make_card
from pathokd.models.vit import Encoder
from pathokd.models.weights import HUB, StateDict, hub_error, read_safetensors
from pathokd.processes import process_rank

FIRST = "student"
"""Name of `model.student` among the students of a run."""
DEFAULT_MODEL_ARGS: dict[str, Any] = {**SWIGLU_ARGS, "dynamic_img_size": True}


@dataclass(frozen=True)
class StudentSpec:
    """Which student, and where its first weights come from.

    Args:
        architecture: any timm vision transformer with a class token.
        model_args: its arguments, JSON-able. None means H0-mini's SwiGLU with `dynamic_img_size` for the
            default architecture, and timm's own defaults for any other.
        image_px: side of the square input.
        init: `scratch`; `timm` (timm's published weights of `architecture`, fetched from the hub);
            `teacher-layers` (blocks of the teacher, same width); or a folder, file or `hf-hub:` name whose
            weights fit.
        layers: blocks of the teacher to take, one per student block; None takes evenly spaced ones, first
            and last included. Only with `teacher-layers`.
        mean: per-channel input mean; None takes the teacher's, also where `init` has another: a warning says so.
        std: per-channel input divisor; None takes the teacher's.
        mpp: microns per pixel; None takes the teacher's.
        seed: of the random weights.

    Raises:
        ValueError: `layers` without `teacher-layers`, or a size below 1.
    """

    architecture: str = DEFAULT_ARCHITECTURE
    model_args: dict[str, Any] | None = None
    image_px: int = 224
    init: str = "scratch"
    layers: list[int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    mpp: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layers is not None and self.init != "teacher-layers":
            raise ValueError(f"layers goes with init: teacher-layers, this student has init: {self.init}.")
        if self.image_px < 1:
            raise ValueError(f"image_px must be at least 1, got {self.image_px}.")
        if not self.init:
            raise ValueError("init must be scratch, timm, teacher-layers or the path of an exported folder.")

    def resolved_args(self) -> dict[str, Any]:
        """The model arguments in force, defaults filled in."""
        if self.model_args is not None:
            return dict(self.model_args)
        return dict(DEFAULT_MODEL_ARGS) if self.architecture == DEFAULT_ARCHITECTURE else {}


def build_student(spec: StudentSpec, teacher: Encoder | ModelCard | None = None) -> Encoder:
    """Build the student that `spec` describes.

    The global random state is left as it was: random weights come from `spec.seed` alone.

    Args:
        spec: the student.
        teacher: source of mean, std, mpp and licence, and of the blocks for `teacher-layers`; a card where there are
            no weights at hand.

    Returns:
        The student in fp32, in training mode.

    Raises:
        ValueError: an unknown architecture or argument, or layers that do not fit the teacher.
        WeightsError: initial weights missing, or of another architecture.
    """
    known = teacher.card if isinstance(teacher, Encoder) else teacher
    card = make_card("student", spec.architecture, spec.resolved_args(), image_px=spec.image_px, **_facts(spec, known))
    with torch.random.fork_rng(devices=[]):
        # Weights are drawn on the CPU. torch.manual_seed would also start every GPU's stream anew, for good.
        torch.default_generator.manual_seed(spec.seed)
        if spec.init == "timm":
            published = _timm_weights(spec)
            _tell_colour(spec, card, published.pretrained_cfg)
            return Encoder(published, card)
        if spec.init not in ("scratch", "teacher-layers"):
            # mask_token and classifier aside, the weights must be exactly the student's.
            weights, origin = _first_weights(spec)
            model = build_loaded(card, weights, spec.init)
            if origin is not None:
                _check_alike(model, origin.model, spec.init)
                _tell_colour(spec, card, asdict(origin.card))
            return Encoder(model, card)
        student = Encoder(build_timm(spec.architecture, card.model_args, image_px=spec.image_px), card)
    if spec.init == "teacher-layers":
        if not isinstance(teacher, Encoder):
            raise ValueError(
                "init: teacher-layers needs a teacher whose blocks can be taken: name its weights, also beside targets."
            )
        copy_layers(student, teacher, spec.layers)
    return student


def even_layers(count: int, depth: int) -> list[int]:
    """`count` block numbers spread evenly over a model of `depth` blocks, the first and the last included.

    Raises:
        ValueError: more blocks wanted than there are.
    """
    if not 1 <= count <= depth:
        raise ValueError(f"a student takes 1 to {depth} blocks of this teacher, got {count}: make it shallower.")
    if count == 1:
        return [depth - 1]
    return [int(layer) for layer in np.rint(np.linspace(0, depth - 1, count))]


@torch.no_grad()
def copy_layers(student: Encoder, teacher: Encoder, layers: Sequence[int] | None = None) -> None:
    """Copy embeddings, norm and selected blocks of the teacher into the student.

    Args:
        student: filled in place.
        teacher: same width, patch, feed-forward and registers.
        layers: teacher block for each student block; None spreads them evenly.

    Raises:
        ValueError: wrong number of layers, a layer the teacher lacks, shapes that differ, or a part of the teacher that
            the student has no place for (named).
    """
    chosen = list(layers) if layers is not None else even_layers(student.card.depth, teacher.card.depth)
    if len(chosen) != student.card.depth:
        raise ValueError(
            f"layers must name one teacher block per student block ({student.card.depth}), got {len(chosen)}."
        )
    wrong = [layer for layer in chosen if not 0 <= layer < teacher.card.depth]
    if wrong:
        raise ValueError(f"layers must lie in 0 to {teacher.card.depth - 1}, got {', '.join(map(str, wrong))}.")
    source: dict[str, Tensor] = teacher.model.state_dict()
    used: set[str] = set()
    for name, target in student.model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(chosen[int(parts[1])])
        origin = ".".join(parts)
        if origin not in source or source[origin].shape != target.shape:
            found = tuple(source[origin].shape) if origin in source else "nothing"
            raise ValueError(
                f"teacher-layers: the student's {name} has shape {tuple(target.shape)}, the teacher has "
                f"{found}; "
                "give the student the teacher's architecture and image_px, and change only its depth."
            )
        target.copy_(source[origin])
        used.add(origin)
    # Blocks without their LayerScale, biases or registers would run, and compute something else.
    left = [name for name in source if name not in used and _block_number(name) in (None, *chosen)]
    if left:
        raise ValueError(
            f"teacher-layers: the teacher has {left[0]} (of {len(left)} such weights), for which the student has no "
            "place: give the student's model_args what the teacher's have (init_values, reg_tokens, qkv_bias, "
            "qk_norm), and change only its depth."
        )
    _check_alike(student.model, teacher.model, "the teacher")


def _block_number(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def _check_alike(own: Any, theirs: Any, whose: str) -> None:
    """Refuse weights whose shapes fit and that mean something else: other heads, or another activation.

    Raises:
        ValueError: names what differs.
    """
    mine, other = _settings(own), _settings(theirs)
    for name, value in mine.items():
        if value != other[name]:
            raise ValueError(
                f"The weights of {whose} are of a model with {name} {other[name]}, and the student has {value}: set "
                f"{name} in the student's model_args, or begin from scratch."
            )


def _settings(model: Any) -> dict[str, Any]:
    """What no shape tells of a block; None where timm keeps it elsewhere."""
    block = model.blocks[0]
    act = getattr(getattr(block, "mlp", None), "act", None)
    return {
        "num_heads": getattr(getattr(block, "attn", None), "num_heads", None),
        "act_layer": None if act is None else type(act).__name__.lower(),
        "mlp_layer": _feed_forward(getattr(block, "mlp", None)),
    }


def _feed_forward(mlp: Any) -> str:
    """Its class, and which half is the gate, in which timm's SwiGLUPacked and GluMlp differ."""
    gate = {True: " gated by the last half", False: " gated by the first half", None: ""}
    return type(mlp).__name__ + gate[getattr(mlp, "gate_last", None)]


def _facts(spec: StudentSpec, teacher: ModelCard | None) -> dict[str, Any]:
    """What the card takes from the teacher unless the spec says otherwise."""
    wanted = {"mean": spec.mean, "std": spec.std, "mpp": spec.mpp}
    facts = {key: value for key, value in wanted.items() if value is not None}
    if teacher is None:
        return facts
    inherited = {key: getattr(teacher, key) for key in (*wanted, "licence")}
    return {**inherited, **facts}


def _tell_colour(spec: StudentSpec, card: ModelCard, origin: Mapping[str, Any]) -> None:
    """Warn where first weights were made for an input that is scaled otherwise than the student's."""
    for name in ("mean", "std"):
        own, theirs = getattr(card, name), tuple(origin[name])
        if getattr(spec, name) is None and own != theirs and process_rank() == 0:
            warnings.warn(
                f"The student begins from {spec.init}, whose input {name} is {theirs}, and takes the teacher's {own}: "
                f"to keep the former, set {name}: {list(theirs)} in the student.",
                stacklevel=2,
            )


def _first_weights(spec: StudentSpec) -> tuple[StateDict, Encoder | None]:
    """Weights that `init` names, under timm's names, and their model; None for a bare file, which does not say."""
    path = Path(spec.init).expanduser()
    if path.suffix != ".safetensors" or path.is_dir() or spec.init.startswith(HUB):
        encoder = load_encoder(spec.init, image_px=spec.image_px)
        return dict(encoder.model.state_dict()), encoder
    state = read_safetensors(path)
    return (state if "cls_token" in state else convert_dinov2(state)), None


def _timm_weights(spec: StudentSpec) -> Any:
    kwargs = {**resolve_model_args(spec.resolved_args()), "img_size": spec.image_px}
    try:
        return timm.create_model(spec.architecture, pretrained=True, num_classes=0, global_pool="token", **kwargs)
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise hub_error(f"hf-hub:timm/{spec.architecture}", error) from error
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise WeightsError(
            f"timm has no pretrained weights that fit {spec.architecture} with {spec.resolved_args()} "
            f"({reason[0] if reason else error}): use init: scratch, or timm's own model_args."
        ) from error
