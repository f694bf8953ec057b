"""One weighted term of a distillation: which loss, on which tokens, of which teacher, seen on which view."""

from dataclasses import dataclass
from typing import Literal

from pathokd.data.views import CLEAN
from pathokd.losses import AlignmentLoss, PrototypeLoss, SpreadLoss

Tokens = Literal["cls", "patches"]


@dataclass(frozen=True)
class Objective:
    """A term of the training loss.

    Args:
        loss: compares the projected student with the standardised teacher, or both with prototypes; or looks at
            the student alone (KoLeo).
        tokens: `cls` or `patches`. Patch grids of different size are brought to the student's.
        teacher: key of one of the module's teachers; may be left out when there is one.
        view: the view the student sees, or several; of a crop drawn several times, each is compared.
        teacher_view: the view the teacher sees, or several: class tokens are compared across all pairs (DINO leaves out
            pairs of one crop), patches with the view of their own crop. The loss is the mean over all of them.
        weight: factor in the sum; not negative.
        detach: train the projector alone, as a probe: the student does not feel this term. For runs on prototypes,
            so that `val/cosine_cls` is measured and an adaptor exported.
    """

    loss: AlignmentLoss | PrototypeLoss | SpreadLoss
    tokens: Tokens = "cls"
    teacher: str | None = None
    view: str | list[str] = CLEAN
    teacher_view: str | list[str] = CLEAN
    weight: float = 1.0
    detach: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}.")
        if not self.views or not self.teacher_views:
            raise ValueError("view and teacher_view must name at least one view each.")
        wanted = self.loss.tokens if isinstance(self.loss, PrototypeLoss) else self.tokens
        if isinstance(self.loss, SpreadLoss):
            wanted = "cls"
        if self.tokens != wanted:
            raise ValueError(f"{type(self.loss).__name__} is for tokens: {wanted}, got {self.tokens}.")
        if self.detach and not isinstance(self.loss, AlignmentLoss):
            raise ValueError(f"detach is for probes, such as Cosine; {type(self.loss).__name__} would train nothing.")

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
