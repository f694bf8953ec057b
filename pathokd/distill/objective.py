"""One weighted term of a distillation: which loss, on which tokens, of which teacher, seen on which view."""

from dataclasses import dataclass
from typing import Literal

from pathokd.data.views import CLEAN
from pathokd.losses import AlignmentLoss

Tokens = Literal["cls", "patches"]


@dataclass(frozen=True)
class Objective:
    """A term of the training loss.

    Args:
        loss: compares the projected student with the standardised teacher.
        tokens: `cls` or `patches`. Patch grids of different size are brought to the student's.
        teacher: key of one of the module's teachers; may be left out when there is one.
        view: the view the student sees; of a crop drawn several times, each is compared.
        teacher_view: the view the teacher sees; for patches it shares its geometry with `view`.
        weight: factor in the sum; not negative.
    """

    loss: AlignmentLoss
    tokens: Tokens = "cls"
    teacher: str | None = None
    view: str = CLEAN
    teacher_view: str = CLEAN
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}.")

    @property
    def name(self) -> str:
        """Name under which the part is logged, such as `cls_cosine` or `h0.cls_cosine`."""
        kind = f"{self.tokens}_{type(self.loss).__name__.lower()}"
        named = kind if self.teacher is None else f"{self.teacher}.{kind}"
        return named if self.view == CLEAN else f"{named}@{self.view}"
