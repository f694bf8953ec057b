"""The student's head for prototype losses: an MLP to a narrow unit vector, and prototypes to compare it with."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PrototypeKind = Literal["cosine", "weight-norm"]
INIT_STD = 0.02
EPS = 1e-6


@dataclass(frozen=True)
class DinoHeadSpec:
    """Heads of the student, one per kind of token; discarded after training.

    Args:
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the unit vector that meets the prototypes.
        layers: linear layers of the MLP.
        prototypes: `cosine` keeps them at length 1, as DINO with a normalised last layer; `weight-norm` learns each
            one's length.

    Raises:
        ValueError: a size below 1, or an unknown kind.
    """

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    prototypes: PrototypeKind = "cosine"

    def __post_init__(self) -> None:
        if min(self.hidden_dim, self.bottleneck_dim, self.layers) < 1:
            raise ValueError(
                f"hidden_dim, bottleneck_dim and layers must be at least 1, got {self.hidden_dim}, "
                f"{self.bottleneck_dim} and {self.layers}."
            )
        if self.prototypes not in get_args(PrototypeKind):
            raise ValueError(f"prototypes must be cosine or weight-norm, got {self.prototypes!r}.")


class DinoHead(nn.Module):
    """MLP with GELU, a unit vector at its end, and K prototypes without bias.

    The logits are vector times prototypes, y W^T. They are left to the loss, which never holds all of them.

    Args:
        in_dim: width of the student's tokens.
        count: K.
        spec: sizes.

    Reference:
        Caron et al. 2021, "DINO" (arXiv 2104.14294), appendix C.
    """

    def __init__(self, in_dim: int, count: int, spec: DinoHeadSpec = DinoHeadSpec()) -> None:
        super().__init__()
        widths = [in_dim, *[spec.hidden_dim] * (spec.layers - 1), spec.bottleneck_dim]
        steps: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            steps += [nn.Linear(wide, narrow), nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1])
        self.direction = nn.Parameter(torch.empty(count, spec.bottleneck_dim))
        self.length = nn.Parameter(torch.ones(count)) if spec.prototypes == "weight-norm" else None
        nn.init.trunc_normal_(self.direction, std=INIT_STD)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Float[Tensor, "*tokens in_dim"]) -> Float[Tensor, "*tokens bottleneck"]:
        """Unit vectors, fp32."""
        vectors: Tensor = self.mlp(tokens)
        return F.normalize(vectors.float(), dim=-1, eps=EPS)

    def prototypes(self) -> Float[Tensor, "count bottleneck"]:
        """The prototypes, fp32; of length 1 unless lengths are learnt."""
        unit = F.normalize(self.direction.float(), dim=-1, eps=EPS)
        return unit if self.length is None else unit * self.length.float()[:, None]
