"""DINO on the class token and iBOT on patch tokens, against prototypes of a frozen teacher that never move.

The teacher's prototypes are a file that `pathokd prototypes` writes; the student learns a head of its own with as many.
Since the teacher is frozen, so is its assignment, and neither loss can fall by collapse.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathokd.losses.assignment import check_sinkhorn, sinkhorn_centre, token_count
from pathokd.losses.cross_entropy import StudentSide, TeacherSide, prototype_cross_entropy

Centring = Literal["frozen", "mean", "sinkhorn"]


class PrototypeLoss(nn.Module):
    """Base of the losses between assignments to prototypes; `forward` takes both sides and returns a scalar.

    Args:
        head: folder or file of the teacher's prototypes, from `pathokd prototypes`.
        centring: `frozen` balances by the centre that Sinkhorn-Knopp gave once over all tiles; `mean` subtracts
            the mean logit, as DINO's centre does, also estimated once; `sinkhorn` balances each batch anew and is
            refused on fewer than K/32 tokens.
        student_temperature: tau of the student.
        teacher_temperature: tau of the teacher, at the first step and after the warm-up.
        warmup: share of all steps over which the teacher's temperature rises linearly.
        random_prototypes_for_tests: number of random prototypes in place of a file. They say nothing about tissue:
            only to try code.

    Raises:
        ValueError: a number out of range, no head, or both kinds.

    Reference:
        Caron et al. 2021, "DINO" (arXiv 2104.14294), eq. 2 to 5; Zhou et al. 2022, "iBOT" (arXiv 2111.07832), eq. 2.
    """

    tokens: Literal["cls", "patches"]
    diagonal: bool

    def __init__(
        self,
        head: str | None = None,
        centring: Centring = "frozen",
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        random_prototypes_for_tests: int | None = None,
    ) -> None:
        super().__init__()
        if (head is None) == (random_prototypes_for_tests is None):
            raise ValueError(
                "A prototype loss needs head, the folder that `pathokd prototypes TEACHER TILES --out FOLDER` wrote: "
                "public teachers carry none, and random ones, which random_prototypes_for_tests gives instead of "
                "a head, say nothing about tissue."
            )
        if centring not in get_args(Centring):
            raise ValueError(f"centring must be one of {', '.join(get_args(Centring))}, got {centring!r}.")
        if min(student_temperature, *teacher_temperature) <= 0:
            raise ValueError(f"temperatures must be positive, got {student_temperature} and {teacher_temperature}.")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of all steps and must lie in [0, 1], got {warmup}.")
        self.head, self.random_prototypes = head, random_prototypes_for_tests
        self.centring: Centring = centring
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup = warmup

    def forward(
        self,
        student: Float[Tensor, "*tokens bottleneck"],
        student_prototypes: Float[Tensor, "prototypes bottleneck"],
        teacher: Float[Tensor, "*tokens dim"],
        teacher_prototypes: Float[Tensor, "prototypes dim"],
        centre: Float[Tensor, " prototypes"],
        teacher_temperature: float,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the student's assignment from the teacher's.

        Args:
            student: tokens after the student's head.
            student_prototypes: of the student's head.
            teacher: standardised unit tokens, one for each of the student's.
            teacher_prototypes: unit vectors.
            centre: frozen centre at this temperature; not used by `sinkhorn`.
            teacher_temperature: tau of this step.
        """
        x = teacher.reshape(-1, teacher.shape[-1])
        if self.centring == "sinkhorn":
            check_sinkhorn(token_count(x), len(teacher_prototypes))
            centre = sinkhorn_centre(x, teacher_prototypes, teacher_temperature)
        y = student.reshape(-1, student.shape[-1])
        return prototype_cross_entropy(
            StudentSide(y, student_prototypes, self.student_temperature),
            TeacherSide(x, teacher_prototypes, centre, teacher_temperature),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward`, typed."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


class DINO(PrototypeLoss):
    """Class tokens: each view of the student against the teacher's view of every other crop of the tile.

    With two global crops that both see, and S local ones that the student alone sees, the mean runs over 2 + 2S
    pairs of views, which is DINO's weighting.

    Args:
        diagonal: also compare a crop with itself, which a frozen teacher allows.
        head: see `PrototypeLoss`, as the others.
        centring: `frozen`, `mean` or `sinkhorn`.
        student_temperature: tau of the student.
        teacher_temperature: tau of the teacher, first and last.
        warmup: share of the steps between the two.
        random_prototypes_for_tests: only to try code.
    """

    tokens = "cls"

    def __init__(
        self,
        head: str | None = None,
        diagonal: bool = False,
        centring: Centring = "frozen",
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        random_prototypes_for_tests: int | None = None,
    ) -> None:
        super().__init__(head, centring, student_temperature, teacher_temperature, warmup, random_prototypes_for_tests)
        self.diagonal = diagonal


class IBOT(PrototypeLoss):
    """Patch tokens: each of the student's against the teacher's at the same place of the same crop.

    Nothing is masked in distillation, so every patch token can take part.

    Args:
        share: of the patch tokens of each image, drawn anew for every batch; 1 takes all.
        head: see `PrototypeLoss`, as the others.
        centring: `frozen`, `mean` or `sinkhorn`.
        student_temperature: tau of the student.
        teacher_temperature: tau of the teacher, first and last.
        warmup: share of the steps between the two.
        random_prototypes_for_tests: only to try code.
    """

    tokens = "patches"
    diagonal = True

    def __init__(
        self,
        head: str | None = None,
        share: float = 1.0,
        centring: Centring = "frozen",
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        random_prototypes_for_tests: int | None = None,
    ) -> None:
        super().__init__(head, centring, student_temperature, teacher_temperature, warmup, random_prototypes_for_tests)
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}.")
        self.share = share

    def sample(self, images: int, patches: int) -> Tensor | None:
        """Places in the row of all (images x patches) tokens that take part, equally many of each image; None: all.

        Drawn from torch's global CPU stream, which checkpoints restore.
        """
        if self.share == 1:
            return None
        kept = max(1, round(self.share * patches))
        within = torch.rand(images, patches).argsort(1)[:, :kept].sort(1).values
        return (within + patches * torch.arange(images)[:, None]).flatten()
