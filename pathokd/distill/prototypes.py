"""Prototype objectives inside a run: which views are paired, the teacher's heads, and how far the student agrees."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.data.views import crop_of
from pathokd.distill.cached import CachedTeacher
from pathokd.distill.network import head_key
from pathokd.distill.objective import Objective, distinct_names
from pathokd.distill.provenance import same_weights
from pathokd.distill.schedules import warmup_linear
from pathokd.errors import TrainingError
from pathokd.losses import InvarianceLoss, PrototypeLoss
from pathokd.losses.assignment import assign, chunk_rows
from pathokd.metrics.precision import full_precision
from pathokd.models.prototype_head import PrototypeHead, read_head, read_header
from pathokd.models.teacher import Teacher
from pathokd.models.weights import state_sha256
from pathokd.processes import gather_objects
from pathokd.types import FloatArray


def view_pairs(objective: Objective, crops: Collection[str]) -> list[tuple[str, str]]:
    """Pairs (student's view, teacher's view) that an objective compares.

    Patch tokens have partners only within one crop. Class tokens are compared across all views, for DINO without those
    of one crop unless it says `diagonal`.

    Args:
        objective: with its views.
        crops: names of the crops that views are of.

    Raises:
        ValueError: a view is left without a partner.
    """
    pairs = []
    for view in objective.views:
        mine = crop_of(view, crops)
        same = [other for other in objective.teacher_views if crop_of(other, crops) == mine]
        others = [other for other in objective.teacher_views if other not in same]
        if objective.tokens == "patches":
            if not same:
                raise ValueError(
                    f"Objective {objective.name} matches patches of the crop {mine!r} with those of "
                    f"{crop_of(others[0], crops)!r}, which shows other tissue: give view and teacher_view one crop, "
                    "or match cls tokens."
                )
            partners = same
        elif isinstance(objective.loss, PrototypeLoss) and not objective.loss.diagonal:
            partners = others
        else:
            partners = list(objective.teacher_views)
        if not partners:
            raise ValueError(
                f"Objective {objective.name} compares the view {view!r} with other crops only, and its teacher_view "
                "names none: add one, or set diagonal: true."
            )
        pairs += [(view, other) for other in partners]
    return pairs


def check_views(objective: Objective, crops: Collection[str]) -> None:
    """Refuse an objective whose views cannot be compared.

    Raises:
        ValueError: see `view_pairs`; or patches of two views of the student that are of different crops.
    """
    if objective.asks_teacher:
        view_pairs(objective, crops)
    shown = {crop_of(view, crops) for view in objective.views}
    if isinstance(objective.loss, InvarianceLoss) and objective.tokens == "patches" and len(shown) > 1:
        raise ValueError(
            f"Objective {objective.name} compares patches of the crops {' and '.join(sorted(shown))}, which show other "
            "tissue: name two views of one crop, or compare cls tokens."
        )


def load_heads(
    objectives: Iterable[tuple[str, Objective]], teachers: Mapping[str, Teacher | CachedTeacher]
) -> dict[str, PrototypeHead]:
    """The teachers' prototypes that objectives ask for.

    Args:
        objectives: with the teacher's key of each.
        teachers: by key.

    Raises:
        TrainingError: a head was made from another teacher.
        ValueError: two heads for one kind of token, or a temperature that a head has no centre for.
        WeightsError: no such file.
    """
    heads: dict[str, PrototypeHead] = {}
    chosen: dict[str, tuple[str | None, int | None]] = {}
    for key, objective in objectives:
        loss = objective.loss
        if not isinstance(loss, PrototypeLoss):
            continue
        name = head_key(key, objective.tokens)
        source = (loss.head, loss.random_prototypes)
        if chosen.setdefault(name, source) != source:
            raise ValueError(
                f"Objectives on {objective.tokens} of teacher {key!r} name two heads, {chosen[name][0]} and "
                f"{loss.head}: one student head learns one."
            )
        if name not in heads:
            heads[name] = _load(loss, objective, key, teachers[key])
        if loss.centring == "frozen":
            for temperature in loss.teacher_temperature:
                heads[name].centre_at(temperature)
    return heads


def _load(loss: PrototypeLoss, objective: Objective, key: str, teacher: Teacher | CachedTeacher) -> PrototypeHead:
    if loss.head is None:
        return PrototypeHead.random(teacher.embed_dim, loss.random_prototypes or 0)
    made = read_header(loss.head)["settings"]
    differs = made_from(made, teacher)
    if differs is not None:
        raise TrainingError(
            f"The prototypes in {loss.head} were made from {made['teacher']} with {differs}: make them for the teacher "
            f"{key!r} of this run."
        )
    return read_head(loss.head, objective.tokens)


def made_from(made: Mapping[str, Any], teacher: Teacher | CachedTeacher) -> str | None:
    """Whether a file was made from this teacher, there and here in fp32 or bf16; None if so, else what differs.

    Args:
        made: settings in the file's header.
        teacher: the teacher here.
    """
    mine = {
        "weights_sha256": made["weights_sha256"] if same_weights(teacher, made) else teacher.weights_sha256,
        "mean": list(teacher.card.mean),
        "std": list(teacher.card.std),
    }
    differs = next((name for name, value in mine.items() if made[name] != value), None)
    return None if differs is None else f"{differs} = {made[differs]!r}, which is {mine[differs]!r} here"


def plan_temperatures(objectives: Sequence[Objective], steps: int) -> dict[str, FloatArray]:
    """The teacher's temperature at each step, by the name of the objective."""
    return {
        name: warmup_linear(
            steps,
            start=objective.loss.teacher_temperature[0],
            final=objective.loss.teacher_temperature[1],
            warmup_steps=round(objective.loss.warmup * steps),
        )
        for name, objective in zip(distinct_names(objectives), objectives, strict=True)
        if isinstance(objective.loss, PrototypeLoss)
    }


def centre_of(loss: PrototypeLoss, head: PrototypeHead, temperature: float) -> Float[Tensor, " count"]:
    """The frozen centre a loss uses at a temperature (with `sinkhorn` it makes its own, and this one is not used)."""
    return head.centre_at(temperature) if loss.centring == "frozen" else head.mean_centre


def head_sha256(head: PrototypeHead) -> str:
    """Identity of a teacher's prototypes, for checkpoints: all that a target is made of, centres and scale too."""
    return state_sha256(dict(head.named_buffers()) | {"temperatures": torch.from_numpy(head.temperatures)})


def check_head(name: str, head: PrototypeHead, saved: str) -> None:
    """Refuse other prototypes than the checkpoint's.

    Args:
        name: of the target.
        head: here.
        saved: `head_sha256` in the checkpoint; older ones hold the hash of the centroids alone.

    Raises:
        TrainingError: they differ.
    """
    older = hashlib.sha256(head.centroids.cpu().numpy().tobytes()).hexdigest()
    if saved not in (head_sha256(head), older):
        raise TrainingError(
            f"The prototypes of {name} are others than when this checkpoint was written: resume with the same head."
        )


class Agreement(nn.Module):
    """How far the student's assignment is the teacher's, accumulated over validation batches.

    Args:
        head: the teacher's prototypes.
        loss: with the temperatures and the centre; those at the end of training.
    """

    def __init__(self, head: PrototypeHead, loss: PrototypeLoss) -> None:
        super().__init__()
        temperature = loss.teacher_temperature[1]
        self.temperatures = loss.student_temperature, temperature
        self.head, self.centre = head, centre_of(loss, head, temperature)
        self.kl, self.same, self.tokens = torch.zeros(()).double(), torch.zeros(()).double(), 0
        self.used_student = self.used_teacher = torch.zeros(head.count).double()

    @torch.no_grad()
    def add(
        self,
        student: Float[Tensor, "*tokens bottleneck"],
        prototypes: Float[Tensor, "count bottleneck"],
        teacher: Float[Tensor, "*tokens dim"],
    ) -> None:
        """Add tokens."""
        rows = chunk_rows(self.head.count)
        y, x = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
        for a, b in zip(torch.split(y.float(), rows), torch.split(x, rows), strict=True):
            with full_precision(a.device):
                q = assign(b @ self.head.centroids.T, self.centre, self.temperatures[1])
                log_p = ((a @ prototypes.float().T) / self.temperatures[0]).log_softmax(-1)
            self.kl = self.kl + torch.special.xlogy(q, q).sub(q * log_p).sum().double().cpu()
            self.same = self.same + (q.argmax(-1) == log_p.argmax(-1)).sum().double().cpu()
            self.used_student = self.used_student + log_p.exp().double().sum(0).cpu()
            self.used_teacher = self.used_teacher + q.double().sum(0).cpu()
            self.tokens += len(a)

    def compute(self, tokens: str) -> dict[str, Tensor]:
        """`kl_TOKENS` (nats), `same_prototype_TOKENS` (share of tokens with one nearest prototype) and `spread_TOKENS`.

        The spread is the number of prototypes the student uses over the teacher's (the perplexities of the mean
        assignments): it falls towards 1 / perplexity as a student collapses. Of the tokens of all processes, each of
        which must call it.
        """
        mine = self.kl, self.same, self.used_student, self.used_teacher, torch.tensor(self.tokens)
        kl, same, student, teacher, n = (torch.stack(sums).sum(0) for sums in zip(*gather_objects(mine), strict=True))
        if not n:
            return {}
        spread = perplexity(student / n) / perplexity(teacher / n)
        values = {"kl": kl / n, "same_prototype": same / n, "spread": spread}
        return {f"{name}_{tokens}": value.float() for name, value in values.items()}


def perplexity(shares: Float[Tensor, " count"]) -> Float[Tensor, ""]:
    """Effective number of prototypes in use, exp of the entropy: 1 if all is in one, K if all are used alike."""
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()
