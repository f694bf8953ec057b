"""A stage that goes on from an exported student: its projectors come along."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pathokd.distill.cached import CachedTeacher
from pathokd.distill.network import ProjectedStudent, head_key
from pathokd.distill.provenance import same_weights
from pathokd.models.projector import Projector
from pathokd.models.standardize import Standardizer
from pathokd.models.teacher import Teacher
from pathokd.models.weights import read_safetensors
from pathokd.processes import process_rank


@torch.no_grad()
def start_heads(
    net: ProjectedStudent,
    folder: str,
    teachers: Mapping[str, Teacher | CachedTeacher],
    statistics: Mapping[str, nn.Module],
    *,
    fill: bool = True,
) -> list[str]:
    """Fill projectors, and the statistics of running teachers, from the adaptors of an exported student.

    A projector begun at random beside a student that is already good would pull it away. Taken are those whose teacher
    has the same name and weights as here, in fp32 or bf16, and which have the shape asked for; a warning names others.

    Args:
        net: with the projectors.
        folder: `student.init`; nothing happens unless it is a folder with adaptors.
        teachers: by key.
        statistics: standardisers of the targets by `head_key`; empty for raw targets.
        fill: take the statistics too. Students of one run have them in common, so only the first one may.

    Returns:
        The `head_key` of each projector that was filled.
    """
    path = Path(folder.removeprefix("local-dir:")).expanduser()
    if not (path / "adaptors.json").is_file():
        return []
    specs = json.loads((path / "adaptors.json").read_text(encoding="utf-8"))
    state = read_safetensors(path / "adaptors.safetensors")
    facts = json.loads((path / "config.json").read_text(encoding="utf-8"))["pathokd"]["facts"]
    known: Mapping[str, Mapping[str, str]] = facts.get("teachers", {})
    filled, random = [], []
    for key, teacher in teachers.items():
        for tokens in ("cls", "patches"):
            name, head = f"{key}.{tokens}", head_key(key, tokens)
            if head not in net.heads:
                continue
            if name not in specs:
                random.append(f"{name} (none of its: {', '.join(n for n in specs if not n.endswith('.statistics'))})")
                continue
            if not same_weights(teacher, known.get(key, {})):
                random.append(f"{name} (of other weights there)")
                continue
            projector: Projector = net.heads[head]  # type: ignore[assignment]
            stored = {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}
            mine = projector.state_dict()
            if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in stored.items()}:
                random.append(f"{name} (of another kind or width there)")
                continue
            projector.load_state_dict(stored)
            standard = statistics.get(head)
            if isinstance(standard, Standardizer):
                own = f"{name}.statistics/"
                if not standard.stored and f"{name}.statistics" in specs and (fill or not standard.count):
                    # Where none stand yet, another student's projector keeps the scale that it learnt in.
                    standard = standard if fill else Standardizer(standard.dim)
                    standard.load_state_dict({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
                last: nn.Linear = projector.net[-1]  # type: ignore[assignment]
                weight, bias = unfolded(last.weight, last.bias, standard)
                last.weight.copy_(weight)
                last.bias.copy_(bias)
            filled.append(head)
    if random and process_rank() == 0:
        warnings.warn(
            f"Projectors begin at random beside the student of {folder}: {', '.join(random)}. To go on with those of "
            "the folder, give the teacher the name and the weights that it has there, and model.projector the kind.",
            stacklevel=2,
        )
    return filled


def unfolded(weight: Tensor, bias: Tensor, standard: Standardizer) -> tuple[Tensor, Tensor]:
    """A last layer that ends in the teacher's own space, as exported ones do, made to end in the standardised one.

    (W x + b - mean) / scale
    """
    scale, mean = (standard.std + standard.eps).to(weight), standard.mean.to(weight)
    return weight / scale[:, None], (bias - mean) / scale
