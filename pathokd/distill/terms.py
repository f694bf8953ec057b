"""What an objective is worth on a batch: the mean of its loss over all its pairs of views."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pathokd.data.batch import TileBatch
from pathokd.distill.batch_features import StudentCache, TargetCache, for_each_crop, one_below_the_other, project
from pathokd.distill.network import ProjectedStudent
from pathokd.distill.objective import Objective, Tokens
from pathokd.distill.prototypes import centre_of, view_pairs
from pathokd.losses import IBOT, AlignmentLoss, InvarianceLoss, PlaceLoss, PrototypeLoss, RelationLoss, SpreadLoss
from pathokd.models.prototype_head import PrototypeHead


class Shared(NamedTuple):
    """What all students of a run have in common on a batch.

    Args:
        batch: its views, places and conditions.
        targets: the teachers on it.
        crops: of the data.
        teacher_of: key of the teacher that an objective asks.
        prototypes: fixed head of a teacher for its tokens.
        temperature: of the teacher at this step, by the name of the objective.
    """

    batch: TileBatch
    targets: TargetCache
    crops: Collection[str]
    teacher_of: Callable[[Objective], str]
    prototypes: Callable[[str, Tokens], PrototypeHead]
    temperature: Callable[[str, PrototypeLoss], float]


def term(name: str, objective: Objective, net: ProjectedStudent, seen: StudentCache, shared: Shared) -> Tensor:
    """What `objective`, called `name` in its run, is worth of the student `net`, a scalar without its weight."""
    loss, teacher, targets = objective.loss, shared.teacher_of(objective), shared.targets
    if isinstance(loss, SpreadLoss):
        return spread_term(objective, loss, seen, shared.batch)
    if isinstance(loss, InvarianceLoss):
        return invariance_term(objective, loss, seen)
    if isinstance(loss, PlaceLoss):
        return place_term(objective, loss, seen, shared.batch)
    if isinstance(loss, RelationLoss):
        return relation_term(objective, loss, teacher, seen, targets, shared.crops)
    if isinstance(loss, PrototypeLoss):
        head, temperature = shared.prototypes(teacher, objective.tokens), shared.temperature(name, loss)
        return prototype_term(objective, loss, teacher, net, head, seen, targets, shared.crops, temperature)
    return alignment_term(objective, loss, teacher, net, seen, targets, shared.crops)


def spread_term(objective: Objective, loss: SpreadLoss, seen: StudentCache, batch: TileBatch) -> Tensor:
    """The student's class tokens among themselves, each view by itself.

    Of a crop drawn several times each draw by itself too: crops of one tile should lie close, and would be parted.
    """
    parts = []
    for view in objective.views:
        x = seen[view].cls
        each = x.reshape(len(batch["key"]), -1, x.shape[-1]).unbind(1)
        parts.append(torch.stack([loss(draw) for draw in each]).mean())
    return torch.stack(parts).mean()


def invariance_term(objective: Objective, loss: InvarianceLoss, seen: StudentCache) -> Tensor:
    """Two views of the student; the second is held still."""
    x, anchor = (getattr(seen[view], objective.tokens) for view in objective.views)
    if len(x) < len(anchor):
        raise ValueError(
            f"Objective {objective.name} holds {len(anchor)} crops still for {len(x)}: name the view with more crops "
            "first."
        )
    return loss(x, for_each_crop(anchor, x))


def place_term(objective: Objective, loss: PlaceLoss, seen: StudentCache, batch: TileBatch) -> Tensor:
    """Registered tiles among themselves, each view by itself."""
    if "place" not in batch:
        raise ValueError(
            f"Objective {objective.name} needs registered tiles, and the batch does not say which show one place: set "
            "data.registered, for example {case: case, conditions: [stain, scanner]}."
        )
    place, condition = batch["place"], batch["condition"]
    vectors = [seen[view].cls for view in objective.views]
    return torch.stack([loss(x, for_each_crop(place, x), for_each_crop(condition, x)) for x in vectors]).mean()


def relation_term(
    objective: Objective,
    loss: RelationLoss,
    teacher: str,
    seen: StudentCache,
    targets: TargetCache,
    crops: Collection[str],
) -> Tensor:
    """Relations among the student's own class tokens against those among the standardised teacher's."""
    parts = []
    for view, teacher_view in view_pairs(objective, crops):
        student = seen[view]
        target = targets.get(teacher, objective.tokens, teacher_view, student.grid)
        parts.append(loss(student.cls, for_each_crop(target, student.cls)))
    return torch.stack(parts).mean()


def alignment_term(
    objective: Objective,
    loss: AlignmentLoss,
    teacher: str,
    net: ProjectedStudent,
    seen: StudentCache,
    targets: TargetCache,
    crops: Collection[str],
) -> Tensor:
    """Projected student against standardised teacher."""
    predictions, wanted = [], []
    for view, teacher_view in view_pairs(objective, crops):
        student = seen[view]
        if objective.detach:
            student = student._replace(cls=student.cls.detach(), patches=student.patches.detach())
        predictions.append(project(net, student, teacher, objective.tokens, targets))
        target = targets.get(teacher, objective.tokens, teacher_view, student.grid)
        wanted.append(for_each_crop(target, predictions[-1]))
    if len(predictions) == 1:
        return loss(predictions[0], wanted[0])
    return loss(one_below_the_other(predictions), one_below_the_other(wanted))


def prototype_term(
    objective: Objective,
    loss: PrototypeLoss,
    teacher: str,
    net: ProjectedStudent,
    head: PrototypeHead,
    seen: StudentCache,
    targets: TargetCache,
    crops: Collection[str],
    temperature: float,
) -> Tensor:
    """Student's assignment to its prototypes against the teacher's to the fixed ones.

    Args:
        objective: with the loss and its views.
        loss: the same, narrowed.
        teacher: key.
        net: student.
        head: the teacher's prototypes.
        seen: student on the batch.
        targets: teachers on the batch.
        crops: of the data.
        temperature: the teacher's, at this step.
    """
    mine, vectors, wanted = net.dino_head(teacher, objective.tokens), [], []
    encoded: dict[str, Tensor] = {}
    for view, teacher_view in view_pairs(objective, crops):
        student: Tensor = getattr(seen[view], objective.tokens)
        target = for_each_crop(targets.unit(teacher, objective.tokens, teacher_view, seen[view].grid), student)
        rows = loss.sample(*student.shape[:2]) if isinstance(loss, IBOT) else None
        if rows is None:
            if view not in encoded:
                encoded[view] = mine(student)
            vectors.append(encoded[view])
        else:
            rows = rows.to(student.device)
            vectors.append(mine(student.flatten(0, 1)[rows]))
            target = target.flatten(0, 1)[rows]
        wanted.append(target)
    y, x = one_below_the_other(vectors), one_below_the_other(wanted)
    return loss(y, mine.prototypes(), x, head.centroids, centre_of(loss, head, temperature), temperature)
