"""From a training run, private and full of state, to the folder that is the product."""

import copy
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathokd.errors import WeightsError
from pathokd.export.checkpoint import export_student
from pathokd.models.build import build_timm
from pathokd.models.cards import ModelCard
from pathokd.models.encoder import Encoder
from pathokd.models.projector import Projector, make_projector
from pathokd.models.sharded import is_checkpoint, is_sharded, read_whole
from pathokd.models.standardize import Standardizer
from pathokd.models.student import FIRST

SCHEMA = "distillation/3"
Which = Literal["best", "last"]


def export_run(
    run: str | Path,
    out_dir: str | Path,
    *,
    student: str = FIRST,
    which: Which | None = None,
    untrained: bool = False,
    half: bool = False,
    licence: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Export the student of a run: its moving average if it has one, with its projectors as adaptor heads.

    The heads are exported together with the statistics their targets were standardised by, so that they map
    the student's tokens to the teacher's own space.

    Args:
        run: folder of a `fit`, or one of its checkpoints, a file or a folder of shards.
        out_dir: folder to make.
        student: which one, of a run with `model.more_students`.
        which: `best` or `last` checkpoint of the folder; by default the best if there is one. The best is that of the
            first student; others take the last unless told.
        untrained: export the same student with random weights and no heads, as a control.
        half: store fp16 weights.
        licence: licence of the student; by default those of all its teachers.
        name: the model's name; by default the folder's.
        overwrite: replace an earlier export.

    Raises:
        ValueError: `which`, and `run` is a single checkpoint.
        WeightsError: no checkpoint there, it is none of pathokd's, or it holds no such student.
    """
    if which is not None and is_checkpoint(run):
        raise ValueError(f"{run} is one checkpoint: leave `which` ({which}) out, or give the folder of the run.")
    path = find_checkpoint(Path(run), which or (None if student == FIRST else "last"))
    checkpoint = _load(path)
    facts = checkpoint["pathokd"]
    if student not in facts["students"]:
        raise WeightsError(f"{path} holds the students {', '.join(facts['students'])}, none called {student!r}.")
    card = ModelCard(**facts["students"][student]["card"])
    if not untrained:
        card = dataclasses.replace(card, licence=_licences(card, facts))
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(facts["students"][student]["spec"]["seed"])
        encoder = Encoder(build_timm(card.architecture, card.model_args, image_px=card.image_px), card)
    adaptors: dict[str, nn.Module] = {}
    if not untrained:
        net = f"students.{student}.{'ema.model' if facts['ema'] else 'net'}."
        encoder.model.load_state_dict(_under(state, f"{net}encoder.model."))
        adaptors = dict(_adaptors(facts, state, net, card.embed_dim))
    return export_student(
        encoder,
        out_dir,
        adaptors=adaptors,
        facts=_public_facts(facts, path, student, untrained),
        licence=licence,
        name=name,
        half=half,
        overwrite=overwrite,
    )


def find_checkpoint(run: Path, which: Which | None = None) -> Path:
    """The checkpoint of a run, a file or a folder of shards.

    Raises:
        WeightsError: there is none.
    """
    if is_checkpoint(run):
        return run
    names = [which] if which else ["best", "last"]
    for name in names:
        if is_checkpoint(run / "checkpoints" / f"{name}.ckpt"):
            return run / "checkpoints" / f"{name}.ckpt"
    raise WeightsError(
        f"{run} holds no checkpoints/{names[-1]}.ckpt: give the folder of a `pathokd fit`, or a .ckpt file."
    )


def _load(path: Path) -> dict[str, Any]:
    checkpoint = read_whole(path) if is_sharded(path) else _load_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("pathokd", {}).get("schema") != SCHEMA:
        raise WeightsError(f"{path} was not written by `pathokd fit` (expected schema {SCHEMA!r} in it).")
    return checkpoint


def _load_file(path: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): train again.") from error
    return checkpoint


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _adaptors(
    facts: Mapping[str, Any], state: Mapping[str, Tensor], net: str, width: int
) -> list[tuple[str, nn.Module]]:
    heads: list[tuple[str, nn.Module]] = []
    for teacher, tokens, dim in facts["targets"]:
        spec = facts["projector"]
        head = make_projector(spec["kind"], width, dim, spec["hidden_dim"])
        head.load_state_dict(_under(state, f"{net}heads.{teacher}__{tokens}."))
        statistics = _under(state, f"statistics.{teacher}__{tokens}.")
        if statistics:
            standardizer = Standardizer(dim)
            standardizer.load_state_dict(statistics)
            head = fold(head, standardizer)
            heads.append((f"{teacher}.{tokens}.statistics", standardizer))
        heads.append((f"{teacher}.{tokens}", head))
    return heads


@torch.no_grad()
def fold(head: Projector, standardizer: Standardizer) -> Projector:
    """A projector that ends in the teacher's own space: scale (W x + b) + mean = (scale W) x + (scale b + mean)."""
    folded = copy.deepcopy(head)
    last: nn.Linear = folded.net[-1]  # type: ignore[assignment]
    scale = standardizer.std + standardizer.eps
    last.weight.mul_(scale[:, None])
    last.bias.mul_(scale).add_(standardizer.mean)
    return folded


def _measures(logged: Mapping[str, float], students: Collection[str], student: str) -> dict[str, float]:
    """What was measured of `student`, without its name: of `val/vits/cka` for vits `val/cka`."""
    own = {}
    for key, value in logged.items():
        stage, _, figure = key.partition("/")
        owner, _, rest = figure.partition("/")
        named = owner in students
        if student == (owner if named else FIRST):
            own[f"{stage}/{rest if named else figure}"] = value
    return own


def _licences(card: ModelCard, facts: Mapping[str, Any]) -> str:
    """The student's licence, which is its first teacher's, and those of the others: it is made of all of them."""
    own = [teacher["card"].get("licence", "unknown") for teacher in facts["teachers"].values()]
    return " and ".join(dict.fromkeys([card.licence, *own]))


def _public_facts(facts: Mapping[str, Any], path: Path, student: str, untrained: bool) -> dict[str, Any]:
    teachers = {key: teacher["card"]["name"] for key, teacher in facts["teachers"].items()}
    if untrained:
        return {"untrained": True, "teacher": None, "data": "none: random weights, a control", "metrics": {}}
    return {
        "teacher": ", ".join(teachers.values()),
        "teachers": {
            key: {
                "name": teachers[key],
                "weights_sha256": teacher["weights_sha256"],
                "weights_sha256_bf16": teacher.get("weights_sha256_bf16"),
                "denoise": teacher.get("denoise"),  # what its targets, and so the heads and cosines here, are without
            }
            for key, teacher in facts["teachers"].items()
        },
        "data": facts["facts"].get("data"),
        "metrics": _measures(facts["metrics"], facts["students"], student),
        "run": str(path.parent.parent.name),
    }
