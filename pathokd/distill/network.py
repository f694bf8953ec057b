"""What is trained: the student's encoder, and per teacher and kind of token a projector or a head with prototypes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from pathokd.distill.objective import Tokens
from pathokd.models.dino_head import DinoHead, DinoHeadSpec
from pathokd.models.encoder import Encoder
from pathokd.models.features import Features
from pathokd.models.projector import make_projector


@dataclass(frozen=True)
class ProjectorSpec:
    """Projectors from student to teacher space.

    Args:
        kind: `linear`, or `mlp` (LayerNorm and two layers).
        hidden_dim: width of the MLP's hidden layer; by default the wider of its two ends. Only for `mlp`.
        solve_tiles: training tiles on which the last layer is solved by ridge regression before the first step
            (`pathokd.distill.projector_start`); 0 begins at random. Those of an exported student stay what they are.

    Raises:
        ValueError: too few tiles to solve anything.
    """

    kind: Literal["linear", "mlp"] = "linear"
    hidden_dim: int | None = None
    solve_tiles: int = 0

    def __post_init__(self) -> None:
        if self.solve_tiles and self.solve_tiles < 16:
            raise ValueError(f"solve_tiles must be 0 (begin at random) or at least 16, got {self.solve_tiles}.")


def head_key(teacher: str, tokens: Tokens) -> str:
    """Key of the projector for `tokens` of `teacher`; module names must not hold a dot."""
    return f"{teacher}__{tokens}"


class ProjectedStudent(nn.Module):
    """Student encoder with its projectors and prototypes; the EMA is kept over the whole of it.

    Args:
        encoder: the student.
        wanted: (teacher, tokens, teacher's width) of each projector.
        spec: kind of projector.
        prototypes: number of prototypes by `head_key`, where an objective compares assignments.
        dino_head: sizes of their heads.
    """

    def __init__(
        self,
        encoder: Encoder,
        wanted: Iterable[tuple[str, Tokens, int]],
        spec: ProjectorSpec,
        prototypes: Mapping[str, int] | None = None,
        dino_head: DinoHeadSpec = DinoHeadSpec(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {
                head_key(teacher, tokens): make_projector(spec.kind, encoder.embed_dim, dim, hidden_dim=spec.hidden_dim)
                for teacher, tokens, dim in wanted
            }
        )
        self.dino_heads = nn.ModuleDict(
            {key: DinoHead(encoder.embed_dim, count, dino_head) for key, count in (prototypes or {}).items()}
        )

    def forward(self, images: Tensor) -> Features:
        """Features of the student, in its own space."""
        features: Features = self.encoder(images)
        return features

    def project(self, features: Features, teacher: str, tokens: Tokens) -> Float[Tensor, "*tokens dim"]:
        """Tokens of the student in the (standardised) space of `teacher`."""
        projected: Tensor = self.heads[head_key(teacher, tokens)](getattr(features, tokens))
        return projected

    def dino_head(self, teacher: str, tokens: Tokens) -> DinoHead:
        """The head that meets the prototypes for `tokens` of `teacher`."""
        return self.dino_heads[head_key(teacher, tokens)]  # type: ignore[return-value]
