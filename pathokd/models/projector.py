"""From the student's space to the teacher's."""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

ProjectorKind = Literal["linear", "mlp"]


class Projector(nn.Module):
    """A map applied to the last dimension: one matrix, or LayerNorm and a two-layer MLP with GELU.

    Args:
        kind: `linear` or `mlp`.
        in_dim: width of the student's vectors.
        out_dim: width of the teacher's vectors.
        hidden_dim: width between the two layers of `mlp`; None takes the larger of `in_dim` and `out_dim`.

    Raises:
        ValueError: unknown kind, a width below 1, or a hidden width for a linear map.
    """

    def __init__(self, kind: ProjectorKind, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        if kind not in get_args(ProjectorKind):
            raise ValueError(f"projector kind must be linear or mlp, got {kind!r}.")
        if min(in_dim, out_dim, hidden_dim or 1) < 1:
            raise ValueError(f"projector widths must be at least 1, got {in_dim}, {out_dim}, {hidden_dim}.")
        if kind == "linear" and hidden_dim is not None:
            raise ValueError(f"a linear projector has no hidden_dim, got {hidden_dim}: leave it out or choose mlp.")
        self.kind: ProjectorKind = kind
        self.in_dim, self.out_dim = in_dim, out_dim
        self.hidden_dim = None if kind == "linear" else hidden_dim or max(in_dim, out_dim)
        if self.hidden_dim is None:
            self.net = nn.Sequential(nn.Linear(in_dim, out_dim))
        else:
            self.net = nn.Sequential(
                nn.LayerNorm(in_dim),
                nn.Linear(in_dim, self.hidden_dim),
                nn.GELU(),
                nn.Linear(self.hidden_dim, out_dim),
            )

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        """Map vectors of width `in_dim` to vectors of width `out_dim`."""
        projected: Tensor = self.net(x)
        return projected

    def spec(self) -> dict[str, str | int | None]:
        """Arguments that rebuild this projector with `make_projector`; JSON-able."""
        return {
            "kind": self.kind,
            "in_dim": self.in_dim,
            "out_dim": self.out_dim,
            "hidden_dim": self.hidden_dim,
        }


def make_projector(kind: ProjectorKind, in_dim: int, out_dim: int, hidden_dim: int | None = None) -> Projector:
    """Build a `Projector`; the arguments and errors are its own."""
    return Projector(kind, in_dim, out_dim, hidden_dim)
