"""One weighted term of a distillation: which loss, on which tokens, of which teacher, seen on which view."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pathokd.data.views import CLEAN
from pathokd.losses import AlignmentLoss, InvarianceLoss, PlaceLoss, PrototypeLoss, RelationLoss, SpreadLoss

Tokens = Literal["cls", "patches"]


@dataclass(frozen=True)
class Objective:
    """A term of the training loss.

    Args:
        loss: compares the projected student with the standardised teacher (Cosine), both with prototypes (DINO), or
            what lies between tiles (RKD); or looks at the student alone: at two of its views (Consistency), at
            registered tiles (RegisteredInfoNCE), at a batch (KoLeo).
        tokens: `cls` or `patches`. Patch grids of different size are brought to the student's.
        teacher: key of one of the module's teachers; may be left out when there is one.
        view: the view the student sees, or several; of a crop drawn several times, each is compared. Of the two that
            Consistency compares, the second is held still.
        teacher_view: the view the teacher sees, or several: class tokens are compared across all pairs (DINO leaves out
            pairs of one crop), patches with the view of their own crop. The loss is the mean over all of them.
        weight: factor in the sum; not negative.
        share: in place of a weight, the share of the whole loss that this term is to have, in (0, 1): its weight then
            follows the running means of all terms (`pathokd.distill.balance`).
        detach: train the projector alone, as a probe: the student does not feel this term. For runs on prototypes,
            so that `val/cosine_cls` is measured and an adaptor exported.
    """

    loss: AlignmentLoss | PrototypeLoss | RelationLoss | InvarianceLoss | PlaceLoss | SpreadLoss
    tokens: Tokens = "cls"
    teacher: str | None = None
    view: str | list[str] = CLEAN
    teacher_view: str | list[str] = CLEAN
    weight: float = 1.0
    detach: bool = False
    share: float | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}.")
        if not self.views or not self.teacher_views:
            raise ValueError("view and teacher_view must name at least one view each.")
        wanted = self.loss.tokens if isinstance(self.loss, PrototypeLoss) else self.tokens
        if isinstance(self.loss, SpreadLoss | RelationLoss | PlaceLoss):
            wanted = "cls"
        if self.share is not None and not (0 < self.share < 1 and self.weight == 1.0):
            raise ValueError(
                f"share must lie between 0 and 1 and stands in place of a weight, got share {self.share} with weight "
                f"{self.weight}."
            )
        if self.share is not None and isinstance(self.loss, SpreadLoss):
            raise ValueError(f"{type(self.loss).__name__} may be negative and can have no share: give it a weight.")
        if isinstance(self.loss, InvarianceLoss) and (len(self.views) != 2 or len(set(self.views)) != 2):
            raise ValueError(
                f"{type(self.loss).__name__} compares two views of the student, got view: {', '.join(self.views)}: "
                "name two different ones, such as [student, student2], and add both to data.photometric."
            )
        if self.tokens != wanted:
            raise ValueError(f"{type(self.loss).__name__} is for tokens: {wanted}, got {self.tokens}.")
        if self.detach and not isinstance(self.loss, AlignmentLoss):
            raise ValueError(f"detach is for probes, such as Cosine; {type(self.loss).__name__} would train nothing.")

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher has a say in this term."""
        return isinstance(self.loss, AlignmentLoss | PrototypeLoss | RelationLoss)

    @property
    def views(self) -> tuple[str, ...]:
        """The student's views."""
        return (self.view,) if isinstance(self.view, str) else tuple(self.view)

    @property
    def teacher_views(self) -> tuple[str, ...]:
        """The teacher's views."""
        return (self.teacher_view,) if isinstance(self.teacher_view, str) else tuple(self.teacher_view)

    @property
    def name(self) -> str:
        """Name under which the part is logged, such as `cls_cosine` or `h0.cls_cosine`."""
        kind = f"{self.tokens}_{type(self.loss).__name__.lower()}"
        named = kind if self.teacher is None else f"{self.teacher}.{kind}"
        return named if self.view == CLEAN else f"{named}@{'+'.join(self.views)}"


def distinct_names(objectives: Sequence[Objective]) -> list[str]:
    """Names of the objectives of a run; of those with one name the second is NAME-2, and so on."""
    names = [objective.name for objective in objectives]
    before = [names[:number].count(name) for number, name in enumerate(names)]
    return [f"{name}-{seen + 1}" if seen else name for name, seen in zip(names, before, strict=True)]
